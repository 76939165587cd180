"""Steps in time, one after the other."""

import tensorflow as tf
from keras import ops


def over_time(step, x, states, number):
    """Takes one step for each entry of a sequence.

    Args:
        step: Function of an entry [B, ...] and the states; it returns a list of results [B, ...]
            and the next states.
        x: Tensor [B, L, ...].
        states: Structure of tensors.
        number: How many results a step has.

    Returns:
        List of the results of all steps, [B, L, ...].
    """
    length = tf.shape(x)[1] if x.shape[1] is None else x.shape[1]
    steps = tf.TensorArray(x.dtype, length, element_shape=x.shape[:1] + x.shape[2:])
    steps = steps.unstack(ops.swapaxes(x, 0, 1))
    made = [tf.TensorArray(x.dtype, length) for _ in range(number)]

    def turn(t, states, made):
        results, states = step(steps.read(t), states)
        return t + 1, states, [a.write(t, r) for a, r in zip(made, results, strict=True)]

    start = (tf.constant(0), states, made)
    _, _, made = tf.while_loop(lambda t, *_: t < length, turn, start, maximum_iterations=length)
    return [ops.swapaxes(array.stack(), 0, 1) for array in made]
