"""Layers in which some of the layers inside were replaced, and that can be saved all the same.

The configuration of a block says how its class makes its layers, so that a copy of the block, or
one from a file, would have them as they were. Here it also says which of them others have replaced.
"""

import functools

import keras

from keras_moe.surgery import held_layers


@keras.saving.register_keras_serializable("keras_moe")
class ReplacedParts:
    """What the class of a layer with replaced parts has beside its own; `declare` makes it."""

    def call(self, *args, **kwargs):
        """As the own class has it; Keras' JAX trainer says `training` to this, not to a call."""
        if "training" not in kwargs or "training" in self.call_signature_parameters:
            return super().call(*args, **kwargs)
        training, own = kwargs.pop("training"), super().call
        return _Told()(function=lambda: own(*args, **kwargs), training=training)

    def get_config(self):
        changed = type(self)
        # Keras writes down the class, and asks whether its configuration is the user's.
        held_layers.set_class(self, own_class(self))
        try:
            layer = keras.saving.serialize_keras_object(self)
        finally:
            held_layers.set_class(self, changed)
        layer.pop("compile_config", None)  # It stands beside this configuration.
        parts = [
            {
                "path": list(path),
                "layer": keras.saving.serialize_keras_object(held_layers.at(self, path)),
            }
            for path in self._replaced_paths
        ]
        return {"layer": layer, "replaced_parts": parts}

    @classmethod
    def from_config(cls, config):
        layer = keras.saving.deserialize_keras_object(config["layer"])
        paths = [tuple(part["path"]) for part in config["replaced_parts"]]
        old = [held_layers.at(layer, path) for path in paths]
        new = {}
        for path, before, part in zip(paths, old, config["replaced_parts"], strict=True):
            if id(before) not in new:  # What is held twice is one layer.
                new[id(before)] = keras.saving.deserialize_keras_object(part["layer"])
            held_layers.put(layer, path, new[id(before)])
        return declare(layer, paths)


class _Told(keras.layers.Layer):
    """Calls a function in which layers hear whether they train."""

    def __init__(self):
        super().__init__(dtype="float32", autocast=False)

    def call(self, function, training=None):
        return function()


def own_class(layer):
    """The class of a layer, without the parts replaced."""
    return type(layer).__mro__[2] if isinstance(layer, ReplacedParts) else type(layer)


def declare(layer, paths):
    """Has the configuration of a layer say which of the layers inside were replaced.

    Args:
        layer: The layer, in which they are replaced.
        paths: Where they are; see `held_layers`.

    Returns:
        The layer, now of a class that inherits from the one it had.
    """
    if isinstance(layer, ReplacedParts):
        paths = [*layer._replaced_paths, *(p for p in paths if p not in layer._replaced_paths)]
    else:
        held_layers.set_class(layer, _with_replaced_parts(type(layer)))
    layer._replaced_paths = tuple(paths)
    held_layers.tell_of_training(layer)  # Without noise, experts that are equal would stay so.
    return layer


@functools.cache
def _with_replaced_parts(own):
    made = type(own.__name__, (ReplacedParts, own), {"__module__": own.__module__})
    # All have one name in files: whichever of them is found by it, `from_config` is the same.
    return keras.saving.register_keras_serializable("keras_moe", "ReplacedParts")(made)
