"""What is compiled once, where JAX would compile every operation or every course of a training."""

import keras
import numpy as np
from keras.ops import convert_to_numpy as numpy


def at_once(function):
    """What a function gives; with JAX compiled as one, where it would compile every operation.

    What it changes there, as the seeds of noise, stays as it was.
    """
    if keras.config.backend() != "jax":
        return function()
    import jax

    def call():
        with keras.StatelessScope(collect_losses=True):
            return function()

    return jax.jit(call)()


def way_back(model):
    """Returns a function that sets a model and its optimizer to what they hold now.

    So one compiled training step serves several courses.
    """
    model.optimizer.build(model.trainable_variables)
    variables = [*model.variables, *model.optimizer.variables]
    values = [np.array(numpy(variable)) for variable in variables]

    def go_back():
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)

    return go_back
