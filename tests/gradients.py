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
        way: As in `helpers.run`, or "graph, any length", in which sequences are of any length, too.
            With JAX everything is compiled, whatever it says: one operation after the other, each
            would be compiled for itself.
        unconnected: As `tf.GradientTape.gradient` has it: "none" or "zero".

    Returns:
        The structure, and lists of the gradients by the float tensors and by the variables.
    """
    return steps(function, tensors, variables, way, unconnected)()


def steps(function, tensors, variables, way="eager", unconnected="none", slices=False):
    """Returns what calls and differentiates again and again, as `with_gradients` does once.

    So what is random is drawn anew, and what is compiled is so once. With `slices` the gradients
    may be TensorFlow's `IndexedSlices`.
    """
    make = _IN[keras.config.backend()]
    return make(function, tensors, variables, way, unconnected, slices)


def _in_tensorflow(function, tensors, variables, way, unconnected, slices=False):
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
        unknown = 1 if "any batch" in way else 2 if "any length" in way else 0
        signature = [
            tf.TensorSpec([*unknown * [None], *x.shape[unknown:]], x.dtype) for x in tensors
        ]
        step = tf.function(
            step, input_signature=signature, jit_compile=way.startswith("xla"), autograph=False
        )

    def call():
        structure, *gradients = step(*tensors)
        for gradient in keras.tree.flatten(gradients):
            assert slices or not isinstance(gradient, tf.IndexedSlices)
        return structure, *gradients

    return call


def _in_jax(function, tensors, variables, way, unconnected, slices):
    import jax

    pure, some, state, structures = _pure(function, tensors, variables)
    step = jax.jit(jax.grad(pure, argnums=(0, 1), has_aux=True))

    def call():
        values = ([v.value for v in part] for part in (variables, state))
        gradients, (flat, after) = step(some, *values)
        for variable, value in zip(state, after, strict=True):
            variable.assign(value)
        structure = keras.tree.pack_sequence_as(structures[-1], flat)
        return structure, *map(list, gradients)

    return call


def _pure(function, tensors, variables):
    """The function for JAX: of float tensors, the variables' values, and the state's.

    Returns:
        The function, the float tensors, the list of the state's variables, and a list to which each
        call of the function adds the structure that `function` returns.
    """
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

    return pure, [tensors[i] for i in floats], state, structures


def curvature(function, tensors, variables, direction, step=3e-4):
    """How gradients change along a direction: by differentiating twice, and by two steps.

    The Hessian matrix is symmetric: its product with the direction is the gradient of the
    gradients' product with it.

    Args:
        function: As in `with_gradients`; each time it draws the same noise.
        tensors: List of float tensors.
        variables: List of variables that it reads.
        direction: List of arrays, for the tensors and then the variables.
        step: The length of the steps, ahead and back.

    Returns:
        Two lists of arrays, for the tensors and then the variables.
    """
    start = [*map(ops.convert_to_tensor, tensors), *map(ops.copy, variables)]
    if keras.config.backend() == "jax":
        gradients, product = _second_in_jax(function, tensors, variables, start, direction)
    else:
        gradients, product = _second_in_tensorflow(function, tensors, variables, direction)
    ahead, back = (
        gradients([x + sign * step * along for x, along in zip(start, direction, strict=True)])
        for sign in (1, -1)
    )
    pairs = zip(ahead, back, strict=True)
    return product, [(np.float64(a) - np.float64(b)) / (2 * step) for a, b in pairs]


def _second_in_jax(function, tensors, variables, start, direction):
    import jax

    pure, _, state, _ = _pure(function, tensors, variables)

    def gradients(x):
        before = [v.value for v in state]
        found = jax.grad(pure, argnums=(0, 1), has_aux=True)
        return sum(map(list, found(x[: len(tensors)], x[len(tensors) :], before)[0]), [])

    def slope(x):
        first = gradients(x)
        return sum((g * d).sum() for g, d in zip(first, direction, strict=True)), first

    both = jax.jit(jax.grad(slope, has_aux=True))
    return lambda x: both(x)[1], both(start)[0]


def _second_in_tensorflow(function, tensors, variables, direction):
    import tensorflow as tf

    tensors = [tf.convert_to_tensor(x) for x in tensors]
    layer = function.layer
    beginning = [(variable, ops.convert_to_numpy(variable)) for variable in layer.variables]

    def gradients(x):
        for variable, value in [*beginning, *zip(variables, x[len(tensors) :], strict=True)]:
            variable.assign(value)
        found = _in_tensorflow(function, x[: len(tensors)], variables, "eager", "zero")()
        return [*found[1], *found[2]]

    values = [variable.value for variable in variables]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        first = gradients([*tensors, *map(tf.identity, values)])
        slope = tf.add_n([tf.reduce_sum(g * d) for g, d in zip(first, direction, strict=True)])
    product = tape.gradient(slope, [*tensors, *values], unconnected_gradients="zero")
    return gradients, product


def value_and_gradients(function, *arguments):
    """The function's value, and the gradients of the sum of its sine."""

    def step(*arguments):
        y = function(*arguments)
        return ops.sum(ops.sin(y)), y

    y, gradients, _ = with_gradients(step, [np.asarray(x) for x in arguments], [])
    return y, gradients


_IN = {"tensorflow": _in_tensorflow, "jax": _in_jax}
