"""Whether two models compute the same."""

import keras
import numpy as np
from keras import ops

from keras_moe.surgery import held_layers

_UNKNOWN = 4  # What a dimension of unknown size has; a batch has 2.
_EXACT, _ROUNDED = 1e-3, 5e-2  # Differences that rounding makes, as a part of the largest output.


class Batch:
    """A batch for a model, the one given or one made up, and what the model makes of it.

    Args:
        model: A built model.
        x: What the model takes, or `None`.

    Raises:
        ValueError: If nothing is known of what the model takes, or too little.
    """

    def __init__(self, model, x):
        if x is not None:
            self.args, self.kwargs = (x,), {}
            self.before = self._outputs(model)
        else:
            self._make_up(model)
        # What is computed in bfloat16 is rounded at every step.
        parts = held_layers.flattened(model)
        exact = {part.compute_dtype for part in parts} <= {"float32", "float64"}
        self.bound = _EXACT if exact else _ROUNDED

    def _make_up(self, model):
        # A model of a class of its own doesn't tell what dtype it takes.
        dtypes = [None] if held_layers.in_graph(model) else ["float32", "int32"]
        errors = []
        for dtype in dtypes:
            self.args, self.kwargs = _made_up(model, dtype)
            try:
                self.before = self._outputs(model)
                return
            except Exception as error:
                errors.append(error)
        raise ValueError(
            f"The model {model.name!r} could not be called with a batch made up for it: give one "
            f"as `x`. Received: {errors[0]}"
        ) from errors[0]

    def _outputs(self, model):
        outputs = keras.tree.flatten(model(*self.args, **self.kwargs))
        return [ops.convert_to_numpy(ops.cast(y, "float32")) for y in outputs]

    def difference(self, model):
        """Says what another model makes of the batch, unless that is the same up to rounding."""
        try:
            after = self._outputs(model)
        except Exception as error:
            return str(error)
        for one, other in zip(self.before, after, strict=True):
            if one.shape != other.shape:
                return f"outputs of shape {one.shape} before, {other.shape} after"
            largest = np.abs(one[np.isfinite(one)]).max(initial=0.0)
            if not np.allclose(other, one, rtol=0, atol=self.bound * largest, equal_nan=True):
                apart = np.abs(other - one).max()
                return f"outputs of up to {largest:.3g} that would be off by up to {apart:.3g}"
        return None


def _made_up(model, dtype):
    """Returns arguments and keyword arguments for a call of a model.

    Args:
        model: A built model.
        dtype: Of what it takes, unless its inputs say so.
    """
    if isinstance(model, keras.Sequential):
        (tensor,) = model.inputs
        return (_entry(tensor.shape, tensor.dtype),), {}
    if held_layers.in_graph(model):
        return (keras.tree.map_structure(lambda t: _entry(t.shape, t.dtype), model.input),), {}
    shapes = dict(model.get_build_config() or {})
    if set(shapes) == {"input_shape"} and shapes["input_shape"] is not None:
        return (_of_shapes(shapes["input_shape"], dtype),), {}
    shapes = shapes.get("shapes_dict")
    if not shapes:
        raise ValueError(
            f"Nothing is known of what the model {model.name!r} takes: give a batch as `x`. "
            "Received: x=None"
        )
    named = {name.removesuffix("_shape"): shape for name, shape in shapes.items()}
    return (), {name: _of_shapes(shape, dtype) for name, shape in named.items() if shape}


def _of_shapes(shapes, dtype):
    """Entries by the shapes in nested lists, tuples and dicts; a shape is of numbers and `None`."""
    if isinstance(shapes, dict):
        return {name: _of_shapes(shape, dtype) for name, shape in shapes.items()}
    if all(size is None or isinstance(size, int) for size in shapes):
        return _entry(shapes, dtype)
    return [_of_shapes(shape, dtype) for shape in shapes]


def _entry(shape, dtype):
    """Normal numbers; or ones, which among words are no padding and in masks hide nothing."""
    sizes = [size or _UNKNOWN for size in shape]
    sizes[0] = shape[0] or 2
    if "float" in dtype:
        return ops.cast(np.random.default_rng(0).normal(size=sizes), dtype)
    return ops.ones(sizes, dtype)
