"""The layers inside a layer: where it holds each of them, and another put in its place.

Keras has nothing public for either. What this needs and is not public stands in this one file,
checked with Keras 3.10 to 3.15: `_layers`, the list of the layers inside a layer; its `_tracker`,
which writes that list and refuses new entries once the layer is built; `_flatten_layers`; the class
of `keras.Model(inputs, outputs)`; and `_call_has_training_arg`, by which `fit` goes.
"""

import functools

import keras
from keras.src.models.functional import Functional

# A path: the name of an attribute, then indices or keys where it is a list, a tuple or a dict.


def is_graph(layer):
    """Whether a layer is a model that `keras.models.clone_model` makes again, of the same class."""
    return type(layer) is keras.Sequential or type(layer).__init__ is Functional.__init__


def in_graph(model):
    """The layers that a model calls by the graph it was made of; none if it has a `call`."""
    return model.layers if isinstance(model, (Functional, keras.Sequential)) else []


def flattened(layer):
    """A layer and all layers inside it, each once, in an order that a copy of it shares."""
    return layer._flatten_layers()


def in_order(layer):
    """Yields each layer directly inside a layer, in the order in which it has got them."""
    if isinstance(layer, (Functional, keras.Sequential)):
        yield from in_graph(layer)
    else:
        yield from layer._layers


def held(layer):
    """Returns pairs (path, layer inside) of what a layer holds by attributes, or in its graph."""
    found = [
        (path, part)
        for name, value in vars(layer).items()
        if name not in _own_names()
        for path, part in _entries(value, (name,))
    ]
    known = {id(part) for _, part in found}
    graph = enumerate(in_graph(layer))
    return found + [(("layers", i), part) for i, part in graph if id(part) not in known]


def at(layer, path):
    """Returns what a layer holds at a path through the layers inside it, as that of `held`."""
    value = layer
    for step in path:
        value = getattr(value, step) if isinstance(value, keras.layers.Layer) else value[step]
    return value


def put(layer, path, new):
    """Puts a layer in the place of another one, at a path through the layers inside a layer."""
    last = max(i for i in range(len(path)) if isinstance(at(layer, path[:i]), keras.layers.Layer))
    owner, (name, *steps) = at(layer, path[:last]), path[last:]
    old = at(layer, path)
    # It stays where it was in the order of the weights, by which the state of an optimizer goes.
    if owner._tracker.is_in_store("layers", old):
        owner._tracker.replace_tracked_value("layers", old, new)
    setattr(owner, name, _with_entry(getattr(owner, name), steps, new))


def set_class(layer, kind):
    """Makes a layer one of another class; Keras need not know."""
    object.__setattr__(layer, "__class__", kind)


def hears_of_training(model):
    """Whether `fit` tells a model that it trains; by default those whose `call` has `training`."""
    return model._call_has_training_arg


def tell_of_training(model, tell=True):
    """Has `fit` tell a model that it trains, and thereby the layers inside, or not."""
    model._call_has_training_arg = tell


def forget_compilation(model):
    """Has a model ask to be compiled anew, and trace anew what it traced of its old layers."""
    model.compiled = False
    model.train_function = model.test_function = model.predict_function = None


@functools.cache
def _own_names():
    """Attributes that Keras itself has, which have the layers once more."""
    x = keras.Input((1,), name="x")  # With names, so that Keras counts none of them.
    y = keras.layers.Identity(name="y")(x)  # Keras 3.10 makes no model without a layer.
    return {*vars(keras.Model(x, y, name="own")), *vars(keras.Sequential([x], name="own"))}


def _entries(value, path):
    if isinstance(value, keras.layers.Layer):
        yield path, value
    elif isinstance(value, (list, tuple)):
        for i, entry in enumerate(value):
            yield from _entries(entry, (*path, i))
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from _entries(entry, (*path, key))


def _with_entry(value, steps, new):
    """A copy of nested lists, tuples and dicts with another entry; the layer itself without."""
    if not steps:
        return new
    step, *steps = steps
    entry = _with_entry(value[step], steps, new)
    if isinstance(value, dict):
        return {**value, step: entry}
    entries = [entry if i == step else old for i, old in enumerate(value)]
    if hasattr(value, "_fields"):
        return type(value)(*entries)
    return tuple(entries) if isinstance(value, tuple) else entries
