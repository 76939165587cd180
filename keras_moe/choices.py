"""What gatings compute of choices, in a way that neither pass needs the host of a GPU for."""

import tensorflow as tf

from keras_moe.sorting import index_range


def top_k(x, k):
    """The K largest entries of each row.

    Args:
        x: Float tensor [T, N].
        k: K, an integer or int32 scalar.

    Returns:
        The entries in decreasing order, [T, K], and their indices, int64 [T, K]: equal ones in
        increasing order of index.
    """

    @tf.custom_gradient
    def call(x):
        values, index = tf.math.top_k(x, k)
        index = tf.cast(index, tf.int64)

        def gradient(upstream, _):  # TensorFlow's own scatters by int32.
            width = tf.constant(x.shape[-1], tf.int64)
            place = index_range(tf.shape(index)[0])[:, None] * width + index
            y = tf.tensor_scatter_nd_update(
                tf.zeros_like(tf.reshape(x, [-1])),
                tf.reshape(place, [-1, 1]),
                tf.reshape(upstream, [-1]),
            )
            return tf.reshape(y, tf.shape(x))

        return (values, index), gradient

    return call(x)


def sum_by_expert(values, expert, num_experts):
    """The sum of the values of each expert, [N].

    Args:
        values: Float tensor of any shape.
        expert: Integer tensor of the same shape; no expert where it is negative.
        num_experts: N.
    """
    # The gradient computes with the index.
    return tf.math.unsorted_segment_sum(values, tf.cast(expert, tf.int64), num_experts)
