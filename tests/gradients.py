"""Gradients of what layers compute, by Keras' backend."""

import keras
import numpy as np
from keras import ops


def with_gradients(function, tensors, variables, way="eager", unconnected="none"):
    """Calls a function and differentiates its first result.

    Args:
        function: Of tensors; it returns a scalar and any structure. It may have an attribute
            `layer`, whose state it changes.
        tensors: List of what it is called with.
        variables: List of variables that it reads.
        way: As in `helpers.run`. With JAX everything is compiled, whatever it says: one operation
            after the other, each would be compiled for itself.
        unconnected: As `tf.GradientTape.gradient` has it: "none" or "zero".

    Returns:
        The structure, and lists of the gradients by the float tensors and by the variables.
    """
    return _IN[keras.config.backend()](function, tensors, variables, way, unconnected)


def _in_tensorflow(function, tensors, variables, way, unconnected):
    import tensorflow as tf

    def step(*tensors):
        floats = [x for x in tensors if x.dtype.is_floating]
        with tf.GradientTape() as tape:
            tape.watch(floats)
            total, structure = function(*tensors)
        values = [getattr(v, "value", v) for v in variables]
        gradients = tape.gradient(total, [floats, values], unconnected_gradients=unconnected)
        return structure, *gradients

    tensors = [tf.convert_to_tensor(x) for x in tensors]
    if way != "eager":
        any_batch = "any batch" in way
        signature = [
            tf.TensorSpec([None if any_batch else len(x), *x.shape[1:]], x.dtype) for x in tensors
        ]
        step = tf.function(
            step, input_signature=signature, jit_compile=way.startswith("xla"), autograph=False
        )
    structure, *gradients = step(*tensors)
    for gradient in keras.tree.flatten(gradients):
        assert not isinstance(gradient, tf.IndexedSlices)
    return structure, *gradients


def _in_jax(function, tensors, variables, way, unconnected):
    import jax

    tensors = [ops.convert_to_tensor(x) for x in tensors]
    floats = [i for i, x in enumerate(tensors) if "float" in str(x.dtype)]
    layer = getattr(function, "layer", None)
    # `non_trainable_variables` have the seeds as well.
    state = [] if layer is None else [*layer.non_trainable_variables, *layer.metrics_variables]
    trained = {id(v) for v in variables}
    state = [v for v in state if id(v) not in trained]
    structures = []

    def pure(some, values, before):
        arguments = list(tensors)
        for i, x in zip(floats, some, strict=True):
            arguments[i] = x
        pairs = [*zip(variables, values, strict=True), *zip(state, before, strict=True)]
        with keras.StatelessScope(pairs, collect_losses=True) as scope:
            total, structure = function(*arguments)
        structures.append(structure)
        after = [scope.get_current_value(v) for v in state]
        return total, (keras.tree.flatten(structure), after)

    step = jax.jit(jax.grad(pure, argnums=(0, 1), has_aux=True))
    gradients, (flat, after) = step(
        [tensors[i] for i in floats], [v.value for v in variables], [v.value for v in state]
    )
    for variable, value in zip(state, after, strict=True):
        variable.assign(value)
    structure = keras.tree.pack_sequence_as(structures[-1], flat)
    return structure, *map(list, gradients)


def value_and_gradients(function, *arguments):
    """The function's value, and the gradients of the sum of its sine."""

    def step(*arguments):
        y = function(*arguments)
        return ops.sum(ops.sin(y)), y

    y, gradients, _ = with_gradients(step, [np.asarray(x) for x in arguments], [])
    return y, gradients


_IN = {"tensorflow": _in_tensorflow, "jax": _in_jax}
