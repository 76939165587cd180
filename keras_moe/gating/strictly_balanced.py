"""Strictly balanced gating (appendix F of the paper): every expert takes as many examples."""

import keras
from keras import ops

from keras_moe import losses
from keras_moe.arguments import check_k, check_weight
from keras_moe.backend import STATIC_SHAPES, choices, exact, indices, vectorization
from keras_moe.gating.gating import Gating, softmax, spoil
from keras_moe.gating.routing import make_routing


class BalancedGating(Gating):
    """What strictly balanced gating does at one level or two: equations 16, 19 and 20."""

    def __init__(self, num_experts, batchwise_loss_weight=1.0, static_shapes=False, **kwargs):
        super().__init__(num_experts, **kwargs)
        self.batchwise_loss_weight = check_weight("batchwise_loss_weight", batchwise_loss_weight)
        self.static_shapes = static_shapes
        self.supports_jit = static_shapes or STATIC_SHAPES

    def choose(self, scores, thresholds, counted, kept=None):
        """Takes what the batch keeps in training, and what is above the thresholds otherwise.

        Args:
            scores: float32 tensor [T, N], G_σ(x).
            thresholds: float32 tensor [N] or [T, N].
            counted: Boolean tensor [T, 1], whether an example counts.
            kept: Boolean tensor [T, N], M_batchwise, or `None` outside training. With it
                L_batchwise is added, unless its weight is 0.

        Returns:
            The choices, `INDEX` [T, K], in decreasing order of the gates, and the gates [T, K].
        """
        chosen = ops.logical_and(counted, scores > thresholds)
        if kept is not None:
            above, chosen = chosen, kept
            if self.batchwise_loss_weight:
                self._add_batchwise_loss(above, chosen, scores, thresholds)

        # An example with NaN keeps it, to itself.
        kept_scores = ops.where(ops.logical_or(chosen, ops.isnan(scores)), scores, 0.0)
        total = ops.sum(kept_scores, axis=-1, keepdims=True)
        gates = kept_scores / ops.where(total == 0, 1.0, total)
        # Counted in floats, which a GPU adds up itself. At least 1, also of no examples, of which
        # the largest count would be minus infinity.
        counts = ops.sum(ops.cast(chosen, scores.dtype), axis=-1)
        most = ops.max(ops.append(counts, ops.ones(1, scores.dtype)))
        most = vectorization.largest_of_turns(ops.cast(most, "int32"))
        ordered = ops.where(ops.isnan(gates), -1.0, gates)  # NaN has no order.
        gates, index = choices.top_k(ordered, scores.shape[-1] if self.supports_jit else most)
        return index, spoil(gates, gates < 0)

    def _add_batchwise_loss(self, above, chosen, scores, thresholds):
        sign = ops.cast(above, scores.dtype) - ops.cast(chosen, scores.dtype)
        disagreement = ops.where(sign == 0, 0.0, sign * (scores - thresholds))
        self.add_loss(losses.in_floatx(self.batchwise_loss_weight * ops.sum(disagreement)))

    def get_config(self):
        return {
            **super().get_config(),
            "batchwise_loss_weight": self.batchwise_loss_weight,
            "static_shapes": self.static_shapes,
        }


@keras.saving.register_keras_serializable("keras_moe")
class StrictlyBalancedGating(BalancedGating):
    """Strictly balanced gating (equations 15 to 20): in training the experts choose the examples.

    With G_σ(x) = softmax(x·W_g), each expert keeps in training the m = ceil(k·|X| / N) examples of
    the batch X for which its G_σ(x)_i is largest, of equal ones the earlier (equation 18). At
    inference, where an answer must not depend on the rest of the batch, expert i takes the
    examples with G_σ(x)_i above a threshold T_i that training has learned (equation 19). Either
    way the gates are the chosen G_σ(x)_i, divided by their sum (equation 16), and an example may
    be chosen by several experts or by none, which gives it zeros.

    The thresholds begin at zero, where nothing is cut off, and learn from L_batchwise
    (equation 20), a loss that is zero where both ways choose alike.

    Example:
    ```python
    gating = keras_moe.StrictlyBalancedGating(num_experts=4, k=2, batchwise_loss_weight=1e-4)
    layer = keras_moe.SparseMoE(4, hidden_units=16, gating=gating)
    ```

    Args:
        num_experts: N, the number of experts.
        k: The number of experts per example on average, from 1 to N.
        batchwise_loss_weight: Weight of L_batchwise, not negative. The paper has none.
        static_shapes: Whether to compute in shapes that the shape of `x` alone determines, as XLA
            needs them: then K = N, and most gates are 0.
        router_z_loss_weight: Weight of `losses.router_z_loss`, not negative.
        **kwargs: Keyword arguments of `keras.layers.Layer`, `dtype` excepted.

    Attributes:
        gate_kernel: Variable [D, N], W_g.
        thresholds: Variable [N], T.

    Call arguments:
        x: Float tensor [T, D].
        training: Whether the experts choose, and L_batchwise is added.
        mask: Boolean tensor [T] or `None`; no expert chooses an example with `False`.

    Returns:
        A `Routing`, an example's experts in decreasing order of the gates. Its K is that of the
        example with most experts, at least 1.

    Raises:
        ValueError: If `num_experts` is not an integer of at least 1, `k` not one between 1 and
            `num_experts`, a weight negative, or a dtype other than float32 is asked for.
    """

    def __init__(self, num_experts, k=4, batchwise_loss_weight=1.0, static_shapes=False, **kwargs):
        super().__init__(num_experts, batchwise_loss_weight, static_shapes, **kwargs)
        self.k = check_k(k, self.num_experts)

    def build(self, input_shape):
        super().build(input_shape)
        self.gate_kernel = self.add_kernel("gate_kernel", input_shape[-1], self.num_experts)
        self.thresholds = self.add_kernel("thresholds", self.num_experts)

    def call(self, x, training=None, mask=None):
        x, mask = self.examples(x, mask)
        logits = exact.matmul(x, self.gate_kernel)
        self.add_router_z_loss(logits, mask)
        scores, counted = scored(logits, mask)
        kept = keep_best(scores, counted, self.k, mask) if training else None
        expert_index, gates = self.choose(scores, self.thresholds, counted, kept)
        return make_routing(expert_index, gates, self.num_experts, mask)

    def get_config(self):
        return {**super().get_config(), "k": self.k}


def scored(logits, mask):
    """Returns G_σ(x) of logits [T, N], and whether each example counts, bool [T, 1]."""
    scores = softmax(logits, competing=logits)
    counted = ops.all(ops.isfinite(scores), axis=-1, keepdims=True)
    if mask is not None:
        counted = ops.logical_and(counted, mask[:, None])
    return scores, counted


def keep_best(scores, counted, k, mask):
    """M_batchwise (equation 18), bool [T, N]: which examples each expert keeps."""
    if mask is None:
        number = ops.cast(ops.shape(scores)[0], indices.INDEX)
    else:
        number = ops.sum(ops.cast(mask, indices.INDEX))
    share = _share(number, k, scores.shape[-1])
    return ops.logical_and(counted, choices.rank(_candidates(scores, counted)) < share)


def keep_best_of_groups(scores, counted, k, group, received, num_groups):
    """The same within groups of examples: each expert of group i keeps the best of X⁽ⁱ⁾.

    Args:
        scores: float32 tensor [R, B], of each example's own group.
        counted: Boolean tensor [R, 1].
        k: The experts per example of a group on average.
        group: Integer tensor [R].
        received: Boolean tensor [R], whether the example is one of the group's.
        num_groups: A.

    Returns:
        Boolean tensor [R, B].
    """
    # By score within their group; who is in none comes last.
    home = ops.where(received, ops.cast(group, indices.INDEX), num_groups)
    ranks = choices.rank(_candidates(scores, counted), home)
    number = ops.cast(
        choices.sum_by_expert(ops.cast(received, scores.dtype), group, num_groups), indices.INDEX
    )
    ranks -= ops.take(ops.cumsum(number) - number, group)[:, None]
    share = _share(number, k, scores.shape[-1])
    return ops.logical_and(counted, ranks < ops.take(share, group)[:, None])


def _candidates(scores, counted):
    return ops.where(counted, scores, -1.0)  # What doesn't count comes last.


def _share(num_examples, k, num_experts):
    """m, the examples of each expert."""
    return (k * num_examples + num_experts - 1) // num_experts
