"""What gatings compute of choices, in a way that neither pass needs the host of a GPU for."""

import tensorflow as tf

from keras_moe.backend.tensorflow.devices import by_device
from keras_moe.backend.tensorflow.indices import index_range
from keras_moe.backend.tensorflow.vectorization import turn_by_turn

_MOST_ROUNDS = 16  # K beyond which a row is sorted


def top_k(x, k):
    """The K largest entries of each row.

    Args:
        x: Float tensor [T, N], without NaN and -inf.
        k: K, an integer or int32 scalar.

    Returns:
        The entries in decreasing order, [T, K], and their indices, int64 [T, K]: equal ones in
        increasing order of index.
    """

    @tf.custom_gradient
    def call(x):
        values, index = by_device(lambda: _sorted(x, k), lambda: _in_rounds(x, k))

        def gradient(upstream, _):  # TensorFlow's own scatters by int32.
            width = tf.constant(x.shape[-1], tf.int64)
            place = index_range(tf.shape(index)[0])[:, None] * width + index
            y = tf.tensor_scatter_nd_update(
                tf.zeros_like(tf.reshape(x, [-1])),
                tf.reshape(place, [-1, 1]),
                tf.reshape(upstream, [-1]),
            )
            return tf.reshape(turn_by_turn(y), tf.shape(x))

        return (values, index), gradient

    return call(x)


def _sorted(x, k):
    values, index = tf.math.top_k(x, k)
    # The maximum, as TensorFlow would do before the conversion what only moves numbers.
    return values, tf.maximum(tf.cast(index, tf.int64), 0)


def _in_rounds(x, k):
    """The same for GPUs, the largest entry first, then the largest of the rest and so on.

    Up to 1000 entries TensorFlow sorts each row completely instead: 4.1 ms for [16384, 256], where
    the whole step took 32 (TensorFlow 2.21, H100). For more it has another way.
    """
    width = x.shape[-1]
    if not isinstance(k, int) or k > _MOST_ROUNDS or width > 1000:
        return _sorted(x, k)
    place = tf.constant([list(range(width))], x.dtype)  # in floats, which a GPU compares itself
    taken = tf.zeros_like(x, tf.bool)
    values, indices = [], []
    for _ in range(k):
        rest = tf.where(taken, x.dtype.min, x)
        largest = tf.reduce_max(rest, axis=1, keepdims=True)
        candidates = tf.logical_and(rest == largest, tf.logical_not(taken))
        index = tf.where(candidates, place, tf.cast(width, x.dtype))
        index = tf.reduce_min(index, axis=1, keepdims=True)
        taken = tf.logical_or(taken, place == index)
        values.append(largest)
        indices.append(index)
    return tf.concat(values, axis=1), tf.cast(tf.concat(indices, axis=1), tf.int64)


def rank(scores, group=None):
    """The ranks of the examples in each column: 0 for the largest score, of equal ones the earlier.

    Args:
        scores: Float tensor [T, N], without NaN.
        group: int64 [T] or `None`; those of earlier groups come first.

    Returns:
        int64 [T, N].
    """
    columns = tf.transpose(scores)
    size = tf.shape(columns)
    _, order = tf.math.top_k(columns, size[1])
    order = tf.cast(order, tf.int64)
    if group is not None:
        _, again = tf.math.top_k(tf.gather(-group, order), size[1])
        order = tf.gather(order, tf.cast(again, tf.int64), batch_dims=1)
    place = tf.gather(tf.reshape(index_range(tf.size(columns)), size), order, batch_dims=1)
    ranks = tf.tile(index_range(size[1]), size[:1])
    ranks = tf.tensor_scatter_nd_update(tf.zeros_like(ranks), tf.reshape(place, [-1, 1]), ranks)
    return tf.transpose(tf.reshape(turn_by_turn(ranks), size))


def sum_by_expert(values, expert, num_experts):
    """The sum of the values of each expert, [N, ...].

    Args:
        values: Float tensor [..., *rest].
        expert: Integer tensor [...]; no expert where it is negative.
        num_experts: N.
    """
    # The gradient computes with the index.
    return tf.math.unsorted_segment_sum(values, tf.cast(expert, tf.int64), num_experts)
