"""Functions that are compiled by themselves, and variables that are made beside others."""

import keras
import tensorflow as tf


def compiled(function):
    """A function of tensors, compiled: one operation after the other would move more bytes."""
    return tf.function(function, jit_compile=True, autograph=False)


def compiled_reading(layer, function):
    """The same of a function that reads a layer's variables: at each call those of that time.

    It takes tensors of any sizes.
    """
    return tf.function(function, reduce_retracing=True, autograph=False)


def reading_often(model, function):
    """The function itself: an eager call compiles nothing."""
    return function


def beside(variable):
    """Inside, variables are held where another one is, so in shards where that one is."""
    held = variable.value if isinstance(variable, keras.Variable) else variable
    return tf.distribute.get_strategy().extended.colocate_vars_with(held)


def layout_of(variable, axes):
    """Nothing: `beside` tells where a variable is."""
