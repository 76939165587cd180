"""Sorting by expert."""

import tensorflow as tf

from keras_moe.backend.tensorflow.devices import by_device
from keras_moe.backend.tensorflow.indices import index_range
from keras_moe.backend.tensorflow.vectorization import turn_by_turn

_SEGMENT = 2048  # entries that a single block of threads of a GPU sorts


def sort(expert, num_experts):
    """Sorts entries by expert, equal ones in the order in which they are.

    Args:
        expert: int64 [M], from 0 to N - 1.
        num_experts: N.

    Returns:
        Which entry comes at each row, int64 [M]; the row of each entry, int64 [M]; the entries of
        each expert, int64 [N].
    """
    return by_device(
        lambda: _at_once(expert, num_experts), lambda: _by_segments(expert, num_experts)
    )


def _at_once(expert, num_experts):
    order = tf.argsort(tf.cast(expert, tf.int32), stable=True)
    # A `bincount` that XLA compiles, and an `invert_permutation` that it compiles whatever the
    # gating has done.
    counts = tf.math.unsorted_segment_sum(tf.ones_like(expert), expert, num_experts)
    order, number = tf.cast(order, tf.int64), tf.shape(expert, out_type=tf.int64)
    row = tf.scatter_nd(order[:, None], tf.range(number[0]), number)
    return order, turn_by_turn(row), counts


def _by_segments(expert, num_experts):
    """The same in segments of equal length, since one block of threads sorts a row of `top_k`.

    Each segment is sorted; the entries of an expert in one follow those in earlier segments.
    """
    number = tf.shape(expert)[0] if expert.shape[0] is None else expert.shape[0]
    smaller, larger = (min, max) if isinstance(number, int) else (tf.minimum, tf.maximum)
    length = larger(smaller(number, _SEGMENT), 1)
    num_segments = -(-number // length)
    behind = tf.fill([num_segments * length - number], tf.constant(num_experts, tf.int64))
    segments = tf.reshape(tf.concat([expert, behind], axis=0), [num_segments, length])
    # Negative keys, as `top_k` begins with the largest; among equal ones it keeps the order.
    keys, order = tf.math.top_k(tf.cast(-segments, tf.int32), length)
    keys, order = -tf.cast(keys, tf.int64), tf.cast(order, tf.int64)

    kinds = tf.tile(index_range(num_experts + 1)[None], [num_segments, 1])
    ends = tf.searchsorted(keys, kinds, side="right", out_type=tf.int64)
    counts = ends - tf.concat([tf.zeros_like(ends[:, :1]), ends[:, :-1]], axis=1)
    total = tf.reduce_sum(counts, axis=0)
    begin = tf.cumsum(total, exclusive=True) + tf.cumsum(counts, axis=0, exclusive=True)
    begin -= ends - counts  # where an expert's entries begin in the sorted segment
    row = tf.reshape(tf.gather(begin, keys, batch_dims=1) + index_range(length), [-1])

    entry = tf.reshape(index_range(num_segments * length), [num_segments, length])
    entry = tf.reshape(tf.gather(entry, order, batch_dims=1), [-1])
    empty = tf.zeros_like(row)
    return (
        tf.tensor_scatter_nd_update(empty, row[:, None], entry)[:number],
        tf.tensor_scatter_nd_update(empty, entry[:, None], row)[:number],
        total[:-1],
    )
