"""Functions that are compiled by themselves, and variables that are made beside others."""

import contextlib

import jax
import keras

from keras_moe.backend.jax import layouts
from keras_moe.backend.requirements import need_tensorflow

compiled = jax.jit


def beside(variable):
    """Nothing: `layout_of` tells where a variable is."""
    return contextlib.nullcontext()


def layout_of(variable, axes):
    """The layout of what has some axes of a variable, under a distribution: where that one is."""
    if keras.distribution.distribution() is None or not isinstance(variable, keras.Variable):
        return None
    layout = layouts.layout_of(variable)
    return keras.distribution.TensorLayout([layout.axes[i] for i in axes], layout.device_mesh)


def without_values():
    """Inside, variables are made without their values: there is no way."""
    need_tensorflow(
        "The footprint of a preset by its name",
        "Give it a model that is made, or set KERAS_BACKEND=tensorflow.",
    )
