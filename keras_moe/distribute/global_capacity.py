"""Which choices find a place at their expert, where the places are those of all replicas."""

from keras import ops

from keras_moe import dispatch
from keras_moe.backend import collectives, indices


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
    expert = ops.where(routing.gates > 0, routing.expert_index, num_experts)
    k = ops.shape(expert)[1]
    kind = ops.arange(k, dtype="int32") * (num_experts + 1) + expert
    kind = ops.transpose(kind)  # k-th choices of one expert
    rank, counts = dispatch.ranks(ops.reshape(kind, (-1,)), k * (num_experts + 1))

    # To each replica the counts of its n experts, [R, K, n], of all replicas' examples.
    num_replicas = collectives.num_replicas()
    counts = ops.reshape(counts, (k, num_experts + 1))[:, :num_experts]
    counts = ops.transpose(ops.reshape(counts, (k, num_replicas, -1)), (1, 0, 2))
    counts = collectives.all_to_all(counts)
    of_choice = ops.sum(counts, axis=0)
    earlier = ops.cumsum(counts, axis=0) - counts + ops.cumsum(of_choice, axis=0) - of_choice
    earlier = ops.transpose(collectives.all_to_all(earlier), (1, 0, 2))
    earlier = ops.pad(ops.reshape(earlier, (k, num_experts)), [[0, 0], [0, 1]])
    place = ops.reshape(rank, ops.shape(kind)) + indices.gather(ops.reshape(earlier, (-1,)), kind)
    kept = ops.transpose(place < capacity)

    rows = ops.sum(counts, axis=(0, 1))
    beyond = ops.sum(ops.maximum(rows - capacity, 0))
    beyond, rows = ops.unstack(collectives.all_sum(ops.stack([beyond, ops.sum(rows)])))
    return routing._replace(gates=ops.where(kept, routing.gates, 0.0)), dispatch.fraction(
        beyond, rows
    )
