"""Memory for time: functions that the backward pass computes again (appendix D of the paper)."""

import contextlib
import threading

import tensorflow as tf

_thread = threading.local()


def recomputed(function, forward=None):
    """Makes the backward pass of a function compute it again instead of storing what is inside.

    Args:
        function: Of tensors or variables; its result is one float tensor. Integers among its
            arguments get no gradient. What is recomputed inside it is computed again once, with it.
        forward: Function that computes the same results another way, for the forward pass.

    Returns:
        A function with the same results and gradients, that keeps its arguments alone.
    """
    if getattr(_thread, "recomputing", False):
        return function

    @tf.custom_gradient
    def call(first, *others):
        def gradient(upstream):
            with tf.GradientTape() as tape, _recomputing():
                arguments = [_after(upstream, first), *map(tf.identity, others)]
                sources = [a for a in arguments if a.dtype.is_floating]
                tape.watch(sources)
                again = function(*arguments)
            found = iter(tape.gradient(again, sources, upstream))
            return [next(found) if a.dtype.is_floating else None for a in arguments]

        return (forward or function)(first, *others), gradient

    # Not variables: a custom gradient would have to answer for each that it reads.
    return lambda *arguments: call(*map(tf.convert_to_tensor, arguments))


@contextlib.contextmanager
def _recomputing():
    before = getattr(_thread, "recomputing", False)
    _thread.recomputing = True
    try:
        yield
    finally:
        _thread.recomputing = before


def _after(upstream, x):
    """`x`, in a graph not to be had before `upstream`.

    Otherwise the optimizer of the graph sees that the second computation equals the first, and
    keeps the first one's results. XLA ignores control dependencies, so the value has to depend.
    """
    if tf.executing_eagerly():
        return tf.identity(x)
    some = tf.reduce_sum(tf.reshape(upstream, [-1])[:1])  # 0 where there is no element
    return x + tf.cast(tf.abs(some) < 0, x.dtype)  # False, also for NaN; compilers don't know that
