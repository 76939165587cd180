"""Functions that are compiled by themselves, and variables that are made beside others."""

import contextlib

import jax
import keras

from keras_moe.backend.jax import layouts

compiled = jax.jit


def compiled_reading(layer, function):
    """The same of a function that reads a layer's variables: at each call those of that time."""

    @jax.jit
    def with_values(values, *tensors):
        with keras.StatelessScope(zip(layer.variables, values, strict=True)):
            return function(*tensors)

    return lambda *tensors: with_values([v.value for v in layer.variables], *tensors)


def reading_often(model, function):
    """The same of a function that reads a model's variables, for many calls: compiled.

    An eager call would compile each loop over time anew. As in `fit`, a model is called eagerly if
    it is told to be, and until it is built.
    """
    compiled = compiled_reading(model, function)

    def call(x):
        if getattr(model, "run_eagerly", False) or not model.built:
            return function(x)
        return compiled(keras.tree.map_structure(keras.ops.convert_to_tensor, x))

    return call


def beside(variable):
    """Nothing: `layout_of` tells where a variable is."""
    return contextlib.nullcontext()


def layout_of(variable, axes):
    """The layout of what has some axes of a variable, under a distribution: where that one is."""
    if keras.distribution.distribution() is None or not isinstance(variable, keras.Variable):
        return None
    layout = layouts.layout_of(variable)
    return keras.distribution.TensorLayout([layout.axes[i] for i in axes], layout.device_mesh)
