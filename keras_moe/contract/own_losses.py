"""What a layer knows of the model around it: who calls it, and whether its losses are read.

What this needs of Keras and is not public stands in this one file, checked with
Keras 3.10 to 3.15. A model finds the layers inside other layers by `_flatten_layers`, reads the
losses of each by its `_get_own_losses`, and begins a call with its `_clear_losses`, which knows
them by `_loss_ids`. The outermost call and the scope of a stateless one, which collects losses, are
kept in Keras' global state.
"""

import warnings
import weakref

import keras
from keras.src.backend.common import global_state

from keras_moe.backend import tracing

_LEFT_OUT = (
    "The losses of {!r} cannot leave the loop or branch that calls it, as that of "
    "`keras.layers.RNN`, so nothing trains by them. Let the loop be unrolled, as by "
    "`keras.layers.RNN(cell, unroll=True)`, or set the weights of all its losses to 0."
)


class OwnLosses:
    """Tells a layer when its losses are read, and leaves out those that nobody can read.

    A class that a layer inherits from before `keras.layers.Layer`. A loss that was added inside a
    loop, a branch or a function of a graph is a tensor of that alone: it is left out, and a warning
    says so.
    """

    _begun_in = None  # A weak reference to the scope of the stateless call that began last.

    def on_call_begins(self):
        """Called when the model, or the layer by itself, is called anew."""

    def on_losses_read(self):
        """Called when whoever has called the model reads its losses, as training does."""

    def _clear_losses(self):
        scope = global_state.get_global_attribute("stateless_scope")
        if scope is not None and scope.collect_losses:
            # In a stateless call, as `fit` makes under JAX, Keras takes each layer that the model
            # calls for the outermost one, and would keep the losses of a layer's last call alone.
            if self._begun_in is not None and self._begun_in() is scope:
                return
            self._begun_in = weakref.ref(scope)
            # The losses that the scope has by now are of others. One may lie where a loss of this
            # layer was before it was freed: Keras would know it by that `id` and throw it away,
            # and Keras 3.10 compare tensors, which JAX can't while it traces.
            for layer in self._flatten_layers():
                layer._loss_ids.clear()
        super()._clear_losses()
        self.on_call_begins()

    def _get_own_losses(self):
        losses = super()._get_own_losses()
        readable = [loss for loss in losses if tracing.can_be_read(loss)]
        if len(readable) < len(losses):
            warnings.warn(_LEFT_OUT.format(self.name), stacklevel=2)
        self.on_losses_read()
        return readable


def added_losses(layer):
    """The losses that a layer and all layers in it have added; not those of regularizers."""
    # Keras' own way, by which nobody is told that they are read: in a stateless call, as `fit`
    # makes under JAX, they are not with the layer.
    parts = layer._flatten_layers()
    return [loss for part in parts for loss in keras.layers.Layer._get_own_losses(part)]


def counts_calls(layer, training):
    """Whether a layer or one in it has metrics that its call may go into, as those of a mixture."""
    scope = global_state.get_global_attribute("stateless_scope")
    if not training and scope is not None and not scope.collect_losses:
        return False  # As in `predict` under JAX, where nothing but the outputs is kept.
    # A model has the metrics of `compile` as well, which its call doesn't go into.
    parts = [part for part in layer._flatten_layers() if not isinstance(part, keras.Model)]
    return any(part.metrics for part in parts)


def called_model():
    """The model, or layer, whose call all else that is being called is a part of, or `None`."""
    context = global_state.get_global_attribute("current_call_ctx")
    return None if context is None else context.entry_layer


def layers_by_name(model, kind):
    """The layers of a class inside a model by name, numbered where several have the same."""
    layers = {}
    for layer in model._flatten_layers():
        if isinstance(layer, kind):
            name, number = layer.name, 0
            while name in layers:
                number += 1
                name = f"{layer.name}_{number}"
            layers[name] = layer
    return layers
