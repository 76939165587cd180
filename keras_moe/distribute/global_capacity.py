"""Which choices find a place at their expert, where the places are those of all replicas."""

import tensorflow as tf

from keras_moe import dispatch
from keras_moe.distribute import collectives


def drop_beyond(capacity, routing, num_experts):
    """Drops the choices that find the places of their expert taken.

    As on one device, first choices come before second ones, and among those earlier examples before
    later ones; here the examples of earlier replicas are the earlier ones.

    Args:
        capacity: C, the places of each expert for the rows of all replicas.
        routing: The `Routing` of this replica's T examples, with K choices each.
        num_experts: N.

    Returns:
        The `Routing`, its gates 0 where a choice is dropped, and the fraction of all replicas'
        choices that are.
    """
    expert = tf.where(routing.gates > 0, routing.expert_index, num_experts)
    k = tf.shape(expert)[1]
    kind = tf.transpose(tf.range(k) * (num_experts + 1) + expert)  # k-th choices of one expert
    rank, counts = dispatch.ranks(tf.reshape(kind, [-1]), k * (num_experts + 1))

    # counts[r, k, i]: how many of the examples of replica r have expert i for their k-th choice.
    counts = tf.reshape(counts, [k, num_experts + 1])
    number = tf.one_hot(collectives.replica(), collectives.num_replicas(), dtype=tf.int32)
    counts = collectives.all_sum(number[:, None, None] * counts)
    earlier = tf.cumsum(counts, exclusive=True)[collectives.replica()]
    earlier += tf.cumsum(tf.reduce_sum(counts, axis=0), exclusive=True)
    place = tf.reshape(rank, tf.shape(kind)) + tf.gather(tf.reshape(earlier, [-1]), kind)
    kept = tf.transpose(place < capacity)

    rows = tf.reduce_sum(counts, axis=[0, 1])[:num_experts]
    dropped = dispatch.fraction(tf.maximum(rows - capacity, 0), rows)
    return routing._replace(gates=tf.where(kept, routing.gates, 0.0)), dropped
