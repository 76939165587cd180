"""The gating layers: which experts an example goes to, and with which weights.

A gating layer is called with the examples `x` [T, D], `training` and `mask` [T], and returns a
`Routing`. T examples, D width, N experts, K experts chosen per example. Gating computes in float32
under every dtype policy: in lower precision an example would pick other experts.
"""

from typing import Any, NamedTuple

import keras
from keras import ops

from keras_moe import losses


class Routing(NamedTuple):
    """The decision of a gating layer for one batch.

    A choice with gate 0 counts for nothing: its row reaches no expert.

    Attributes:
        expert_index: int32 [T, K], the chosen experts.
        gates: float32 [T, K], their weights G(x).
        importance: float32 [N], the sum of the gates per expert (equation 6).
        load: float32 [N], the smooth estimator of the rows per expert in noisy training
            (equation 10), the number of rows otherwise.
    """

    expert_index: Any
    gates: Any
    importance: Any
    load: Any


class _LinearGating(keras.layers.Layer):
    """What the gating layers share: float32, the kernel W_g, the treatment of masked examples."""

    def __init__(self, num_experts, **kwargs):
        kwargs.setdefault("dtype", "float32")
        super().__init__(**kwargs)
        if num_experts < 1:
            raise ValueError(f"`num_experts` must be at least 1. Received: {num_experts}")
        self.num_experts = num_experts
        self.supports_masking = True

    def build(self, input_shape):
        self.gate_kernel = self._add_kernel("gate_kernel", input_shape)

    def _add_kernel(self, name, input_shape):
        # Appendix A: zeros, so that all experts start with an equal chance.
        return self.add_weight(
            name=name, shape=(input_shape[-1], self.num_experts), initializer="zeros"
        )

    def _routing(self, expert_index, gates, mask, chances=None):
        """Takes masked examples out of the gates [T, K] and of the balance.

        `chances` [T, N] are the terms of the smooth load; the hard load stands in without them.
        """
        if mask is not None:
            gates = ops.where(mask[:, None], gates, 0.0)
        if chances is None:
            load = losses.hard_load(gates, expert_index, self.num_experts)
        else:
            counted = ops.isfinite(chances)
            if mask is not None:
                counted = ops.logical_and(counted, mask[:, None])
            load = ops.sum(ops.where(counted, chances, 0.0), axis=0)
        importance = losses.importance(gates, expert_index, self.num_experts)
        return Routing(expert_index, gates, importance, load)

    def get_config(self):
        return {**super().get_config(), "num_experts": self.num_experts}


@keras.saving.register_keras_serializable("keras_moe")
class SoftmaxGating(_LinearGating):
    """Dense gating: every expert, weighted by softmax(x·W_g) (equation 2).

    Args:
        num_experts: N, the number of experts.
        **kwargs: Keyword arguments of `keras.layers.Layer`. The dtype is float32 unless given.

    Call arguments:
        x: Float tensor [T, D].
        training: Without effect.
        mask: Boolean tensor [T] or `None`; examples with `False` get gates of 0.

    Returns:
        A `Routing` with K = N.
    """

    def call(self, x, training=None, mask=None):
        logits = ops.matmul(x, self.gate_kernel)
        gates = _softmax(logits, competing=logits)
        expert_index = ops.broadcast_to(
            ops.arange(self.num_experts, dtype="int32"), ops.shape(gates)
        )
        return self._routing(expert_index, gates, mask)


@keras.saving.register_keras_serializable("keras_moe")
class NoisyTopKGating(_LinearGating):
    """Noisy top-k gating with trainable noise (equations 3 to 5, 8 to 10).

    H(x) = x·W_g + N(0, 1)·(softplus(x·W_noise) + noise_epsilon), G(x) = softmax of the K largest
    entries of H(x). The noise is there in training alone. Equal logits go to the lower index. With
    k = 1 that softmax is constant and would teach the gating nothing, so the gate is then the
    chosen expert's probability under the softmax over all experts.

    Args:
        num_experts: N, the number of experts.
        k: K, the number of experts chosen per example, from 1 to N.
        noise: Whether training adds noise. Without it the load is a count, and has no gradient.
        noise_epsilon: The least standard deviation of the noise, above 0.
        seed: Integer, seed of the noise.
        **kwargs: Keyword arguments of `keras.layers.Layer`. The dtype is float32 unless given.

    Call arguments:
        x: Float tensor [T, D].
        training: Whether to add noise and to estimate the load smoothly.
        mask: Boolean tensor [T] or `None`; examples with `False` get gates of 0.

    Returns:
        A `Routing`, the choices of an example in decreasing order of H(x).

    Raises:
        ValueError: If `k` is not between 1 and `num_experts`, or `noise_epsilon` is not above 0.
    """

    def __init__(self, num_experts, k=4, noise=True, noise_epsilon=1e-2, seed=None, **kwargs):
        super().__init__(num_experts, **kwargs)
        if not 1 <= k <= num_experts:
            raise ValueError(
                "`k`, the experts chosen per example, must be between 1 and `num_experts`. "
                f"Received: k={k}, num_experts={num_experts}"
            )
        if noise_epsilon <= 0:
            raise ValueError(f"`noise_epsilon` must be above 0. Received: {noise_epsilon}")
        self.k = k
        self.noise = noise
        self.noise_epsilon = noise_epsilon
        self.seed = seed
        if noise:
            self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape):
        super().build(input_shape)
        if self.noise:
            self.noise_kernel = self._add_kernel("noise_kernel", input_shape)

    def call(self, x, training=None, mask=None):
        logits = clean_logits = ops.matmul(x, self.gate_kernel)
        noisy = training and self.noise
        if noisy:
            stddev = ops.softplus(ops.matmul(x, self.noise_kernel)) + self.noise_epsilon
            logits += stddev * keras.random.normal(ops.shape(logits), seed=self.seed_generator)
        # NaN has no order: without this a sort may return anything as an index.
        logits = ops.where(ops.isnan(logits), -float("inf"), logits)
        # One more than K: the load asks for the threshold below the last choice.
        top_logits, top_index = ops.top_k(logits, min(self.k + 1, self.num_experts))
        chosen = top_logits[:, : self.k]
        gates = _softmax(chosen, competing=logits if self.k == 1 else chosen)
        chances = None
        if noisy and self.k < self.num_experts:
            chances = losses.load(clean_logits, logits, stddev, top_logits)
        expert_index = ops.cast(top_index[:, : self.k], "int32")
        return self._routing(expert_index, gates, mask, chances)

    def get_config(self):
        return {
            **super().get_config(),
            "k": self.k,
            "noise": self.noise,
            "noise_epsilon": self.noise_epsilon,
            "seed": self.seed,
        }


def _softmax(logits, competing):
    """The share of each of `logits` in the softmax over the logits `competing`."""
    return ops.exp(logits - ops.logsumexp(competing, axis=-1, keepdims=True))
