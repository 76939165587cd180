"""Strictly balanced gating (appendix F of the paper): every expert takes as many examples."""

import keras
from keras import ops

from keras_moe import losses
from keras_moe.arguments import check_k, check_weight
from keras_moe.routing import Gating, make_routing, softmax


@keras.saving.register_keras_serializable("keras_moe")
class StrictlyBalancedGating(Gating):
    """Strictly balanced gating (equations 15 to 20): in training the experts choose the examples.

    With G_σ(x) = softmax(x·W_g), each expert keeps in training the m = ceil(k·|X| / N) examples of
    the batch X for which its G_σ(x)_i is largest, of equal ones the earlier (equation 18). At
    inference, where an answer must not depend on the rest of the batch, expert i takes the
    examples with G_σ(x)_i above a threshold T_i that training has learned (equation 19). Either
    way the gates are the chosen G_σ(x)_i, divided by their sum (equation 16), and an example may
    be chosen by several experts or by none, which gives it zeros.

    The thresholds begin at zero, where nothing is cut off, and learn from L_batchwise
    (equation 20), a loss that is zero where both ways choose alike.

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
        super().__init__(num_experts, **kwargs)
        self.k = check_k(k, self.num_experts)
        self.batchwise_loss_weight = check_weight("batchwise_loss_weight", batchwise_loss_weight)
        self.static_shapes = static_shapes
        self.supports_jit = static_shapes

    def build(self, input_shape):
        self.gate_kernel = self.add_kernel("gate_kernel", input_shape[-1], self.num_experts)
        self.thresholds = self.add_kernel("thresholds", self.num_experts)

    def call(self, x, training=None, mask=None):
        logits = ops.matmul(x, self.gate_kernel)
        self.add_router_z_loss(logits, mask)
        scores = softmax(logits, competing=logits)
        counted = ops.all(ops.isfinite(scores), axis=-1, keepdims=True)
        if mask is not None:
            counted = ops.logical_and(counted, mask[:, None])
        chosen = ops.logical_and(counted, scores > self.thresholds)
        if training:
            above, chosen = chosen, self._batchwise(scores, counted, mask)
            disagreement = self._disagreement(scores, above, chosen)
            self.add_loss(losses.in_floatx(self.batchwise_loss_weight * disagreement))

        # By multiplication: an example with NaN keeps it to itself.
        kept = scores * ops.cast(chosen, scores.dtype)
        total = ops.sum(kept, axis=-1, keepdims=True)
        gates = kept / ops.where(total == 0, 1.0, total)
        most = ops.max(ops.sum(ops.cast(chosen, "int32"), axis=-1), initial=1)
        ordered = ops.where(ops.isnan(gates), -1.0, gates)  # NaN has no order.
        gates, expert_index = ops.top_k(ordered, self.num_experts if self.static_shapes else most)
        gates = ops.where(gates < 0, float("nan"), gates)
        return make_routing(ops.cast(expert_index, "int32"), gates, self.num_experts, mask)

    def _batchwise(self, scores, counted, mask):
        """M_batchwise, bool [T, N]: which examples each expert keeps."""
        candidates = ops.where(counted, scores, -1.0)  # What doesn't count comes last.
        order = ops.argsort(-candidates, axis=0)
        rank = ops.argsort(order, axis=0)
        number = ops.shape(scores)[0] if mask is None else ops.sum(ops.cast(mask, "int32"))
        return ops.logical_and(counted, rank < self._share(number))

    def _share(self, num_examples):
        """m, the examples of each expert."""
        return (self.k * num_examples + self.num_experts - 1) // self.num_experts

    def _disagreement(self, scores, above, chosen):
        """L_batchwise: how far the scores are on the wrong side of the thresholds."""
        sign = ops.cast(above, scores.dtype) - ops.cast(chosen, scores.dtype)
        return ops.sum(ops.where(sign == 0, 0.0, sign * (scores - self.thresholds)))

    def get_config(self):
        return {
            **super().get_config(),
            "k": self.k,
            "batchwise_loss_weight": self.batchwise_loss_weight,
            "static_shapes": self.static_shapes,
        }
