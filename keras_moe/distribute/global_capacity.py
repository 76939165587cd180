"""Which choices find a place at their expert, where the places are those of all replicas."""

import tensorflow as tf

from keras_moe import dispatch
from keras_moe.backend import collectives


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

    # To each replica the counts of its n experts, [R, K, n], of all replicas' examples.
    num_replicas = collectives.num_replicas()
    counts = tf.reshape(counts, [k, num_experts + 1])[:, :num_experts]
    counts = tf.transpose(tf.reshape(counts, [k, num_replicas, -1]), [1, 0, 2])
    counts = collectives.all_to_all(counts)
    earlier = tf.cumsum(counts, exclusive=True)
    earlier += tf.cumsum(tf.reduce_sum(counts, axis=0), exclusive=True)
    earlier = tf.transpose(collectives.all_to_all(earlier), [1, 0, 2])
    earlier = tf.pad(tf.reshape(earlier, [k, num_experts]), [[0, 0], [0, 1]])
    place = tf.reshape(rank, tf.shape(kind)) + tf.gather(tf.reshape(earlier, [-1]), kind)
    kept = tf.transpose(place < capacity)

    rows = tf.reduce_sum(counts, axis=[0, 1])
    beyond = tf.reduce_sum(tf.maximum(rows - capacity, 0))
    beyond, rows = tf.unstack(collectives.all_sum(tf.stack([beyond, tf.reduce_sum(rows)])))
    return routing._replace(gates=tf.where(kept, routing.gates, 0.0)), dispatch.fraction(
        beyond, rows
    )
