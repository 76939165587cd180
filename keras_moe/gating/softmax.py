"""Dense gating: every expert computes every example."""

import keras
from keras import ops

from keras_moe.backend import exact
from keras_moe.gating.gating import Gating, softmax
from keras_moe.gating.routing import make_routing


@keras.saving.register_keras_serializable("keras_moe")
class SoftmaxGating(Gating):
    """Dense gating: every expert, weighted by softmax(x·W_g) (equation 2).

    Example:
    ```python
    layer = keras_moe.SparseMoE(4, hidden_units=16, gating="softmax")
    ```

    Args:
        num_experts: N, the number of experts.
        router_z_loss_weight: Weight of `losses.router_z_loss`, not negative.
        **kwargs: Keyword arguments of `keras.layers.Layer`, `dtype` excepted.

    Call arguments:
        x: Float tensor [T, D].
        training: Without effect.
        mask: Boolean tensor [T] or `None`; examples with `False` get gates of 0.

    Returns:
        A `Routing` with K = N, the experts of an example in order of index.
    """

    @property
    def k(self):
        """K = N: every expert."""
        return self.num_experts

    def build(self, input_shape):
        super().build(input_shape)
        self.gate_kernel = self.add_kernel("gate_kernel", input_shape[-1], self.num_experts)

    def call(self, x, training=None, mask=None):
        x, mask = self.examples(x, mask)
        logits = exact.matmul(x, self.gate_kernel)
        self.add_router_z_loss(logits, mask)
        gates = softmax(logits, competing=logits)
        expert_index = ops.broadcast_to(
            ops.arange(self.num_experts, dtype="int32"), ops.shape(gates)
        )
        return make_routing(expert_index, gates, self.num_experts, mask)
