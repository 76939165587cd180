"""Other layers in the place of some inside a model, wherever in it they are."""

import collections
import contextlib
import copy
import inspect

import keras

from keras_moe.surgery import held_layers
from keras_moe.surgery.replaced_parts import declare, own_class


def replace_layers(model, new, check, in_place=False):
    """Returns a model with other layers in the place of some.

    Models of the Functional API and `Sequential` ones are built again; of every other layer with
    one of them inside the class stays, and the attributes that hold them change.

    Args:
        model: A built model.
        new: List of pairs (layer inside the model, layer in its place).
        check: Function of the new model that raises what is wrong with it. A model that was to
            change in place is then as it was.
        in_place: Whether to change the model itself, in place of a copy that shares nothing.

    Returns:
        The model, not compiled.

    Raises:
        ValueError: If a layer is not in the model or not where another one can be put, or the
            model cannot be copied.
    """
    inside = {id(layer) for layer in held_layers.flattened(model)}
    for layer, _ in new:
        if id(layer) not in inside or layer is model:
            raise ValueError(
                f"The layers must be inside the model {model.name!r}. Received: {layer!r}"
            )
    if in_place and held_layers.is_graph(model):
        raise ValueError(
            f"The graph of {type(model).__name__} {model.name!r} has to be built again, so the "
            "model cannot be changed in place: leave out `in_place`."
        )
    work = _Replacement(new, in_place)
    with contextlib.ExitStack() as stack:
        for layer in _models_in(model):
            stack.enter_context(_uncompiled(layer))
        try:
            result = work.convert(model)
            work.check_complete()
            if not in_place:
                _check_sharing(model, result, new)
            check(result)
        except Exception:
            work.undo()
            raise
    if in_place:
        for layer in _models_in(result):
            held_layers.forget_compilation(layer)
    return result


def _models_in(layer):
    """The models among a layer and the layers inside it."""
    return [part for part in held_layers.flattened(layer) if isinstance(part, keras.Model)]


class _Replacement:
    """What becomes of each layer: it stays, is copied, or another takes its place."""

    def __init__(self, new, in_place):
        self.in_place = in_place
        self.new = {id(old): layer for old, layer in new}
        self.missing = {id(old): old for old, _ in new}
        self.origins = {}  # Of the id of a copy the layer it is a copy of.
        self.converted = {}
        self.copies = []  # No id may come to stand for another layer.
        self.changes = []  # Of layers: what was where, and of which class they were.

    def origin(self, layer):
        return self.origins.get(id(layer), layer)

    def touches(self, layer):
        """Whether one of the layers to be replaced is inside a layer, or is the layer."""
        return any(id(self.origin(part)) in self.new for part in held_layers.flattened(layer))

    def convert(self, layer):
        """Returns what takes the place of a layer, always the same for the same one."""
        if not isinstance(layer, keras.layers.Layer):
            return layer  # A function in a graph, as an addition.
        key = id(self.origin(layer))
        if key not in self.converted:
            self.converted[key] = self._convert(layer)
        return self.converted[key]

    def _convert(self, layer):
        key = id(self.origin(layer))
        if key in self.new:
            self.missing.pop(key, None)
            return self.new[key]
        if not self.touches(layer):
            return layer if self.in_place or key != id(layer) else self._copied(layer)
        if held_layers.is_graph(layer):
            made = keras.models.clone_model(layer, clone_function=self.convert)
            if not made.built:  # A `Sequential` of unknown shape is built when it is called.
                made.build_from_config(layer.get_build_config())
            if not layer.trainable:
                made.trainable = False
            return made
        if not self.in_place and key == id(layer):
            layer = self._copied(layer)
        paths = []
        self._change(layer, (), paths, set())
        told = held_layers.hears_of_training(layer)
        self.changes.append((held_layers.tell_of_training, layer, told))
        self.changes.append((held_layers.set_class, layer, type(layer)))
        return declare(layer, paths)

    def _change(self, layer, path, paths, seen):
        """Replaces what a layer and the layers inside it hold by attributes."""
        seen.add(id(layer))
        graph = {id(part) for part in held_layers.in_graph(layer)}
        for step, part in held_layers.held(layer):
            if not self.touches(part) or id(part) in seen:
                continue
            if id(self.origin(part)) in self.new or held_layers.is_graph(part):
                if id(part) in graph:
                    continue  # The graph would go on calling it.
                self.changes.append((held_layers.put, layer, step, part))
                held_layers.put(layer, step, self.convert(part))
                paths.append((*path, *step))
            else:
                self._change(part, (*path, *step), paths, seen)

    def _copied(self, layer):
        parts = held_layers.flattened(layer)
        try:
            # As if saved and loaded: the weights, vocabularies, and what else a class saves.
            with keras.saving.custom_object_scope(_named_in(parts)):
                copied = copy.deepcopy(layer)
        except Exception as error:
            raise ValueError(
                f"A copy of {type(layer).__name__} {layer.name!r} cannot be made from its "
                "configuration. Give the class a `get_config` that has all arguments of its "
                "`__init__`, register it and its functions "
                "(`keras.saving.register_keras_serializable`), or change the model itself, by "
                f"`in_place=True`. Received: {error}"
            ) from error
        copies = held_layers.flattened(copied)
        if [type(part) for part in copies] != [type(part) for part in parts]:
            raise ValueError(
                f"A copy of {type(layer).__name__} {layer.name!r} from its configuration has other "
                f"layers inside: {[part.name for part in copies]}. Received: "
                f"{[part.name for part in parts]}"
            )
        for old, new in zip(parts, copies, strict=True):
            new.trainable = old.trainable  # Those inside follow, and have theirs later.
            self.origins[id(new)] = old
        self.copies += copies
        return copied

    def undo(self):
        for function, *args in reversed(self.changes):
            function(*args)

    def check_complete(self):
        if self.missing:
            names = [layer.name for layer in self.missing.values()]
            raise ValueError(
                "These layers are where no other can be put: a model with a class of its own calls "
                "them by a graph made in its `__init__`, or holds them by no attribute. Make a "
                "plain `keras.Model(inputs, outputs)` or `keras.Sequential` of it. Received: "
                f"{names}"
            )


def _named_in(layers):
    """Classes and functions of layers by the names that Keras writes down for them.

    Without functions of which several have the same name, as those by `lambda`.
    """
    functions = {
        id(value): value
        for layer in layers
        for value in vars(layer).values()
        if inspect.isfunction(value)
    }
    counts = collections.Counter(function.__name__ for function in functions.values())
    kinds = map(own_class, layers)
    return {
        **{kind.__name__: kind for kind in kinds},
        **{f.__name__: f for f in functions.values() if counts[f.__name__] == 1},
    }


@contextlib.contextmanager
def _uncompiled(model):
    """Inside, copies of a model are not compiled: Keras cannot copy losses of the user's own."""
    compiled, model.compiled = model.compiled, False
    try:
        yield
    finally:
        model.compiled = compiled


def _check_sharing(model, result, new):
    """Raises ValueError if layers share a weight, of which each copy has one of its own."""
    replaced = [old for old, _ in new]
    kept = _weights(model) - set().union(*map(_weights, replaced))
    others = _weights(result) - set().union(*(_weights(layer) for _, layer in new))
    if len(kept) != len(others):
        raise ValueError(
            f"Layers of {model.name!r} hold one another's weights, which their copies would not: "
            "change the model itself, by `in_place=True`. Received: "
            f"{len(kept)} weights, of which the copies have {len(others)}"
        )


def _weights(layer):
    return {id(weight) for weight in layer.weights}
