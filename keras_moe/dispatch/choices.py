"""What gatings compute of choices, in a way that neither pass needs the host of a GPU for."""

import tensorflow as tf
from keras import ops

from keras_moe.dispatch.sorting import index_range
from keras_moe.dispatch.vectorization import turn_by_turn

INDEX = "int64"  # of numbers of examples and experts that are computed with: see `sorting.py`


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
        # The maximum, as TensorFlow would do before the conversion what only moves numbers.
        index = tf.maximum(tf.cast(index, tf.int64), 0)

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


def leaves(group, member, experts_per_group):
    """The experts' numbers among all, of choices at two levels.

    Args:
        group: int64 [T, K_primary].
        member: int64 [T·K_primary, K_secondary], the number within the group.
        experts_per_group: B.

    Returns:
        int64 [T, K_primary·K_secondary].
    """
    (num_examples, num_groups), width = ops.shape(group), ops.shape(member)[1]
    # To the shape of the result first: TensorFlow would bring a conversion to int32 before it.
    first = (group * experts_per_group)[:, :, None]
    first = ops.broadcast_to(first, (num_examples, num_groups, width))
    shape = (num_examples, num_groups * width)
    return ops.reshape(first, shape) + ops.reshape(member, shape)


def sum_by_expert(values, expert, num_experts):
    """The sum of the values of each expert, [N, ...].

    Args:
        values: Float tensor [..., *rest].
        expert: Integer tensor [...]; no expert where it is negative.
        num_experts: N.
    """
    # The gradient computes with the index.
    return tf.math.unsorted_segment_sum(values, tf.cast(expert, tf.int64), num_experts)
