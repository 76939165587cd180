"""Indices, and gathers by them, in int64.

TensorFlow computes int32 arithmetic on the host, also where there is a GPU, and copies what it
needs there and back; int64 stays on the GPU (seen with TensorFlow 2.21).
"""

import numpy as np
import tensorflow as tf

from keras_moe.backend.tensorflow.devices import by_device
from keras_moe.backend.tensorflow.vectorization import turn_by_turn

INDEX = "int64"  # of numbers of examples, rows and experts that are computed with

# Keras' own leaves variables what they are.
tensor = tf.convert_to_tensor
gather = tf.gather
ensure_shape = tf.ensure_shape


def index_range(number):
    """0, 1, … as int64 [number]."""

    def on_gpu():  # `tf.range` would have its arguments copied to the host, constants, too.
        known = tf.get_static_value(number)
        if known is not None:
            return tf.constant(np.arange(known, dtype="int64"))
        return tf.cumsum(tf.ones([number], tf.int64), exclusive=True)

    return by_device(lambda: tf.range(tf.cast(number, tf.int64)), on_gpu)


def at_least(least, size):
    """The larger of two sizes, an integer where both are known."""
    return max(least, size) if isinstance(size, int) else tf.maximum(least, size)


def at_most(most, size):
    """The smaller of two sizes, an integer where both are known."""
    return min(most, size) if isinstance(size, int) else tf.minimum(most, size)


def largest(sizes):
    """The largest of some sizes, an integer or a tensor, as a size of at least 1."""
    return at_least(1, sizes if isinstance(sizes, int) else tf.reduce_max(tf.cast(sizes, tf.int32)))


def run_of(ends, place):
    """Of consecutive runs the one that each place is in; their number where it is in none.

    Args:
        ends: int64 [R], the place behind each run.
        place: int64 [M].

    Returns:
        int64 [M].
    """
    return tf.searchsorted(ends, place, side="right", out_type=tf.int64)


def placed(values, place, size, empty):
    """A vector with each value in its place, and `empty` in all others.

    Args:
        values: int64 [M].
        place: int64 [M], of no other value unless it is the last one.
        size: The number of places, an integer or int32 scalar.
        empty: Integer or int64 scalar.

    Returns:
        int64 [size].
    """
    nothing = tf.fill([size], tf.cast(empty, tf.int64))
    return turn_by_turn(tf.tensor_scatter_nd_update(nothing, place[:, None], values))


def spread(table, index):
    """table[index] along the first axis. Each row's gradient is a sum, and all of it dense."""
    index = tf.identity(index)  # The gradient closes over it: see `devices.captured`.

    @tf.custom_gradient
    def gather(table):
        def gradient(upstream):
            return tf.math.unsorted_segment_sum(upstream, index, table.shape[0])

        return tf.gather(table, index), gradient

    return gather(tf.convert_to_tensor(table))
