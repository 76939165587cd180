"""How evenly the experts are used: importance, load and the balance losses (equations 6 to 11).

Pure functions of `keras.ops`. N experts, T examples, K experts chosen per example.
"""

from keras import config, ops

from keras_moe.backend import choices

# Keeps CV² defined when nothing was routed. The original implementation uses the same value.
_EPSILON = 1e-10


def cv_squared(x):
    """Squared coefficient of variation of a vector, CV² (equations 7 and 11).

    The population variance over the squared mean: 0 when all entries are equal, N - 1 when a
    single one of N entries is not zero.

    Example:
    ```python
    keras_moe.losses.cv_squared(ops.array([1.0, 0.0, 0.0, 0.0]))  # 3.0
    ```

    Args:
        x: Float tensor [N], not negative.

    Returns:
        Float scalar; 0 where `x` is all zeros.
    """
    mean = ops.mean(x)
    return ops.mean(ops.square(x - mean)) / (ops.square(mean) + _EPSILON)


def max_over_mean(x):
    """The largest entry of a vector over its mean, the last column of Table 6.

    Example:
    ```python
    keras_moe.losses.max_over_mean(ops.array([3.0, 1.0, 1.0, 0.0]))  # 2.4
    ```

    Args:
        x: Float tensor [N], not negative.

    Returns:
        Float scalar, 1 when all entries are equal; 0 where `x` is all zeros.
    """
    return ops.max(x) / (ops.mean(x) + _EPSILON)


def importance(gates, expert_index, num_experts):
    """Importance of each expert: the sum of its gates over the batch (equation 6).

    Example:
    ```python
    gates = ops.array([[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]])
    expert_index = ops.array([[0, 1], [0, 2], [0, 1]])
    keras_moe.losses.importance(gates, expert_index, 4)  # [2.25, 0.25, 0.5, 0.0]
    ```

    Args:
        gates: Float tensor [T, K]. Entries that are not finite are left out: an example that is
            broken spoils its own output, not the balance of the batch.
        expert_index: Integer tensor [T, K], the expert of each gate.
        num_experts: N.

    Returns:
        Float tensor [N], differentiable with respect to `gates`.
    """
    finite = ops.where(ops.isfinite(gates), gates, 0.0)
    return choices.sum_by_expert(finite, expert_index, num_experts)


def hard_load(gates, expert_index, num_experts):
    """Number of examples routed to each expert. It has no gradient.

    Example:
    ```python
    gates = ops.array([[0.75, 0.25], [0.5, 0.5], [1.0, 0.0]])  # A gate of 0 is no choice.
    expert_index = ops.array([[0, 1], [0, 2], [0, 1]])
    keras_moe.losses.hard_load(gates, expert_index, 4)  # [3.0, 1.0, 1.0, 0.0]
    ```

    Args:
        gates: Float tensor [T, K].
        expert_index: Integer tensor [T, K], the expert of each gate.
        num_experts: N.

    Returns:
        Float tensor [N].
    """
    return importance(ops.cast(gates > 0, gates.dtype), expert_index, num_experts)


def load(clean_logits, noisy_logits, noise_stddev, top_logits):
    """Chance of each expert to be among the top K when its noise is drawn anew (equation 9).

    P(x, i) = Φ((clean_i - kth_excluding(noisy, K, i)) / stddev_i). Without expert i, the K-th
    largest logit is the (K+1)-th of all where i is among the top K, and the K-th where it isn't.

    Args:
        clean_logits: Float tensor [T, N], x·W_g.
        noisy_logits: Float tensor [T, N], H(x).
        noise_stddev: Float tensor [T, N], positive.
        top_logits: Float tensor [T, K+1], the largest noisy logits in decreasing order.

    Returns:
        Float tensor [T, N]. Its sum over the examples is the smooth estimator Load(X)
        (equation 10), differentiable with respect to all four arguments.
    """
    if_in, if_out = top_logits[:, -1:], top_logits[:, -2:-1]
    threshold = ops.where(noisy_logits > if_in, if_in, if_out)
    return normal_cdf((clean_logits - threshold) / noise_stddev)


def router_z_loss(logits, counted=None):
    """Keeps the logits of a gating small: the mean of logsumexp(x·W_g)² over the examples.

    Zoph et al. (2022, "ST-MoE", arXiv:2202.08906), equation 5.

    Example:
    ```python
    keras_moe.losses.router_z_loss(ops.zeros((3, 4)))  # log(4)²
    ```

    Args:
        logits: Float tensor [T, N], without noise. Examples with NaN or infinity are left out.
        counted: Boolean tensor [T], `False` for examples to leave out; `None` for all `True`.

    Returns:
        Float scalar; 0 where no example counts.
    """
    squares = ops.square(ops.logsumexp(logits, axis=-1))
    finite = ops.isfinite(squares)
    counted = finite if counted is None else ops.logical_and(finite, counted)
    number = ops.sum(ops.cast(counted, logits.dtype))
    return ops.sum(ops.where(counted, squares, 0.0)) / ops.maximum(number, 1.0)


def in_floatx(loss):
    """A loss in the dtype in which Keras adds up the losses of a model."""
    return ops.cast(loss, config.floatx())


def normal_cdf(x):
    """Φ, the cumulative distribution function of the standard normal distribution."""
    return 0.5 * (1.0 + ops.erf(x * 0.5**0.5))
