"""A mixture that others recompute: its experts alone are, and losses keep their gradients."""

import contextlib

from keras_moe.backend import outer_recomputation
from keras_moe.contract.own_losses import added_losses
from keras_moe.contract.recomputing import recomputing
from keras_moe.experts.feed_forward import FeedForwardExperts


class RecomputesExperts:
    """What `tf.recompute_grad`, `keras.remat` and `keras.RematScope` make of a mixture.

    A class that a layer inherits from before `keras.layers.Layer`. It has `experts` and
    `shared_experts`.
    """

    def rematerialized_call(self, layer_call, *args, **kwargs):
        """Under `keras.RematScope` the backward pass computes the experts again, and no more.

        Keras would run all of `call` again: the balance losses would have no gradient.
        """
        if super().rematerialized_call(layer_call, *args, **kwargs) is layer_call:
            return layer_call
        banks = [self.experts, self.shared_experts]
        return recomputing(layer_call, [bank for bank in banks if hasattr(bank, "recompute")])

    def unrecorded_experts(self):
        """Where others recompute the layer, they do the experts; whose losses must be recorded."""
        adds_losses = not isinstance(self.experts, FeedForwardExperts)
        return contextlib.nullcontext() if adds_losses else outer_recomputation.unrecorded()

    def refuse_lost_losses(self):
        """Raises ValueError where losses were added of which nothing is recorded."""
        if outer_recomputation.is_lost() and added_losses(self):
            raise ValueError(
                "Inside of `tf.recompute_grad`, `keras.remat` or a model made in a "
                f"`keras.RematScope` the losses of {self.name!r} only have gradients where its "
                "input is an argument of what is recomputed; recompute what is before the layer "
                "apart, and the layer's experts by `recompute=True`, or set the weights of all its "
                "losses to 0. Received: an input that is computed inside"
            )
