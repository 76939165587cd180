"""Frozen stays frozen: layers that know which of their parts are to be trained.

In Keras `trainable` is an attribute of each layer and stands in its configuration. But a layer that
makes its parts by itself begins with parts that are trainable whatever it is, and its
configuration says nothing about theirs, so that none of its copies would have them frozen.

Nothing public finds the layers inside a layer; `_layers` and `_flatten_layers` are private
(checked with Keras 3.10 to 3.15).
"""

import inspect

import keras

# In a configuration: `trainable` of each part in which that isn't as in the layer around it.
TRAINABLE_PARTS = "trainable_parts"


class FreezableParts:
    """Freezes a layer's parts with it, and has `trainable` of each part stand in its configuration.

    A class that a layer inherits from before that of Keras. It ends its `__init__` by a call of
    `freeze_parts`, and its `from_config`, if it has one, by that of this class. Parts of parts
    count, those as well that are no layers of this package; what a part makes only when it is
    built is as trainable as the part is, if it is built by `build_once` or `call_once`.
    """

    def freeze_parts(self):
        """Freezes all parts of a layer that is frozen."""
        if not self.trainable:
            _set_parts(self, {})

    def get_config(self):
        config = super().get_config()
        exceptions = dict(_exceptions(self))
        return {**config, TRAINABLE_PARTS: exceptions} if exceptions else config

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        exceptions = config.pop(TRAINABLE_PARTS, {})
        layer = cls(**config)
        # Without exceptions a layer that is trainable may come from a file older than these.
        if exceptions or not layer.trainable:
            _set_parts(layer, exceptions)
        return layer


def copy_trainable(source, target):
    """Makes a layer and all its parts as trainable as another one of the same structure."""
    target.trainable = source.trainable
    _set_parts(target, dict(_exceptions(source)))


def build_once(part, *args):
    """Builds a part: by its own `build`, if it has one that builds all, else by `call_once`.

    Args:
        part: A layer, built or not.
        *args: Symbolic tensors to call it with. A `build` of one shape gets that of the first one.
    """
    if part.built:
        return
    known, build = set(map(id, part._flatten_layers())), type(part).build
    if build is not keras.layers.Layer.build and len(inspect.signature(build).parameters) == 2:
        part.build(args[0].shape)  # Tracing its call would take longer.
        _freeze_new(part, known)
    if not all(layer.built for layer in part._flatten_layers()):
        call_once(part, *args)


def call_once(part, *args):
    """Calls a part on symbolic tensors, which builds it, whether it has a `build` or not.

    Returns:
        What the call returns.
    """
    known = set(map(id, part._flatten_layers()))
    y = part(*args)
    _freeze_new(part, known)
    return y


def _parts(layer):
    """Yields (name, part) of what a layer holds: by attribute, else by number."""
    names = {}
    for name, value in vars(layer).items():
        if name.startswith("_"):
            continue
        if isinstance(value, (list, tuple)):
            names.update({id(part): f"{name}.{i}" for i, part in enumerate(value)})
        else:
            names[id(value)] = name
    # A `Sequential` has an input layer only once it is built.
    parts = [p for p in layer._layers if not isinstance(p, keras.layers.InputLayer)]
    for i, part in enumerate(parts):
        yield names.get(id(part), str(i)), part


def _exceptions(layer, path=""):
    """Yields (path, trainable) of each part that differs from the layer that it is a part of."""
    for name, part in _parts(layer):
        if part.trainable != layer.trainable:
            yield path + name, part.trainable
        yield from _exceptions(part, f"{path}{name}.")


def _set_parts(layer, exceptions, path=""):
    """Makes all parts as trainable as the layer that each is a part of, but for the exceptions."""
    for name, part in _parts(layer):
        part.trainable = exceptions.get(path + name, layer.trainable)
        _set_parts(part, exceptions, f"{path}{name}.")


def _freeze_new(layer, known):
    """Freezes what is not among the known ids and in something frozen."""
    for _, part in _parts(layer):
        if id(part) not in known and not layer.trainable:
            part.trainable = False
        _freeze_new(part, known)
