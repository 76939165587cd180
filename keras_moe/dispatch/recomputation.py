"""Memory for time: functions that the backward pass computes again (appendix D of the paper)."""

import functools

import tensorflow as tf


def recomputed(function, forward=None):
    """Makes the backward pass of a function compute it again instead of storing what is inside.

    Args:
        function: Of float tensors or variables; its result is one float tensor.
        forward: Function that computes the same results another way, for the forward pass.

    Returns:
        A function with the same results and gradients, that keeps its arguments alone.
    """

    @tf.custom_gradient
    def call(first, *others):
        def gradient(upstream):
            with tf.GradientTape() as tape:
                arguments = [_after(upstream, first), *map(tf.identity, others)]
                tape.watch(arguments)
                again = function(*arguments)
            return tape.gradient(again, arguments, upstream)

        return (forward or function)(first, *others), gradient

    # Not variables: a custom gradient would have to answer for each that it reads.
    return lambda *arguments: call(*map(tf.convert_to_tensor, arguments))


def recomputing(layer_call, banks):
    """A layer's call, during which banks of experts recompute."""

    @functools.wraps(layer_call)
    def call(*args, **kwargs):
        before = [bank.recompute for bank in banks]
        try:
            for bank in banks:
                bank.recompute = True
            return layer_call(*args, **kwargs)
        finally:
            for bank, recompute in zip(banks, before, strict=True):
                bank.recompute = recompute

    return call


def _after(upstream, x):
    """`x`, in a graph not to be had before `upstream`.

    Otherwise the optimizer of the graph sees that the second computation equals the first, and
    keeps the first one's results. XLA ignores control dependencies, so the value has to depend.
    """
    if tf.executing_eagerly():
        return tf.identity(x)
    some = tf.reduce_max(tf.reshape(upstream, [-1])[:1])  # -inf where there is no element
    return x + tf.cast(tf.abs(some) < 0, x.dtype)  # False, also for NaN; compilers don't know that
