"""What all gating layers share.

A gating layer is called with the examples `x` [T, D], `training` and `mask` [T], and returns a
`Routing`. T examples, D width, N experts, K experts chosen per example. Gating computes in float32
under every dtype policy: in lower precision an example would pick other experts.
"""

import keras
from keras import ops

from keras_moe import losses
from keras_moe.arguments import check_size, check_weight
from keras_moe.contract.inputs import as_input, as_mask
from keras_moe.contract.own_losses import OwnLosses
from keras_moe.contract.symbolic_calls import TracedWithANumber
from keras_moe.saving import CheckedVariables


class Gating(TracedWithANumber, OwnLosses, CheckedVariables, keras.layers.Layer):
    """What all gating layers share: the number of experts, float32, and the router z-loss."""

    def __init__(self, num_experts, router_z_loss_weight=0.0, **kwargs):
        super().__init__(**{"dtype": "float32", **kwargs})
        if self.dtype_policy.name != "float32":
            raise ValueError(
                "Gating computes in float32 whatever the dtype of the model; leave `dtype` out. "
                f"Received: dtype={self.dtype_policy.name!r}"
            )
        self.num_experts = check_size("num_experts", num_experts)
        self.router_z_loss_weight = check_weight("router_z_loss_weight", router_z_loss_weight)
        self.input_spec = keras.InputSpec(ndim=2)
        self.supports_masking = True

    def build(self, input_shape):
        self.input_spec = keras.InputSpec(ndim=2, axes={-1: input_shape[-1]})

    def examples(self, x, mask):
        """Returns what a call is given as float32 [T, D] and, unless `None`, bool [T]."""
        x = as_input(self, x)
        return x, as_mask(mask, x)

    def rematerialized_call(self, layer_call, *args, **kwargs):
        """Under `keras.RematScope` nothing is computed again: it would draw other noise."""
        return layer_call

    def add_kernel(self, name, *shape):
        """Adds a kernel that starts at zero: an equal chance for all experts (appendix A)."""
        return self.add_weight(name=name, shape=shape, initializer="zeros")

    def add_router_z_loss(self, logits, counted=None):
        """Adds the weighted z-loss of logits [T, N] of which `counted` [T] take part."""
        if self.router_z_loss_weight:
            z_loss = losses.router_z_loss(logits, counted)
            self.add_loss(losses.in_floatx(self.router_z_loss_weight * z_loss))

    def expert_axis(self, variable):
        return {"gate_kernel": 1, "noise_kernel": 1, "thresholds": 0}.get(variable.name)

    def get_config(self):
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "router_z_loss_weight": self.router_z_loss_weight,
        }


def softmax(logits, competing):
    """The share of each of `logits` in the softmax over the logits `competing`."""
    return ops.exp(logits - ops.logsumexp(competing, axis=-1, keepdims=True))


def spoil(gates, broken):
    """Makes gates NaN where `broken`: nobody is chosen there, and nothing is a right answer.

    By 0 / 0, as a constant NaN would be found where no example is broken.
    """
    sound = ops.cast(ops.logical_not(broken), gates.dtype)
    return gates * sound / sound
