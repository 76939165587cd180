"""Functions that are compiled by themselves, and variables that are made beside others."""

import contextlib

import jax

from keras_moe.backend.requirements import need_tensorflow

compiled = jax.jit


def beside(variable):
    """Nothing: where a variable is, its layout tells."""
    return contextlib.nullcontext()


def without_values():
    """Inside, variables are made without their values: there is no way."""
    need_tensorflow(
        "The footprint of a preset by its name",
        "Give it a model that is made, or set KERAS_BACKEND=tensorflow.",
    )
