"""The way of the rows to the replicas that hold their experts, and back."""

import tensorflow as tf

from keras_moe import dispatch
from keras_moe.distribute import collectives, internals
from keras_moe.routing import Routing


def on_their_replicas(function, rows, rows_per_expert, make_plan, most=None):
    """Applies a function to rows on the replicas that hold the rows' experts.

    Replica r of R holds n = N/R experts, from r·n. All send each other as many rows: as many as the
    one of most for another has, or `most`, if the shapes must not depend on the data.

    Args:
        function: Called with the rows of all replicas for this replica's experts and their `Plan`;
            returns them with another width.
        rows: Float tensor [M, D], sorted by expert.
        rows_per_expert: int32 [N]. Rows behind those belong to no expert, and come back as zeros.
        make_plan: Function from the `Routing` of rows to n experts to their `Plan`.
        most: The most rows that a replica can have for another one, an integer or int32 scalar;
            defaults to M.

    Returns:
        Float tensor [M, width], the rows in the order in which they were given.
    """
    num_replicas = collectives.num_replicas()
    num_rows = tf.shape(rows)[0]
    # A replica without examples takes part as well, with a row that belongs to no expert.
    rows = tf.pad(rows, [[0, tf.maximum(1 - num_rows, 0)], [0, 0]])
    counts = tf.reshape(rows_per_expert, [num_replicas, -1])
    sizes = tf.reduce_sum(counts, axis=1)
    if internals.compiling():
        size = tf.shape(rows)[0] if most is None else tf.minimum(tf.shape(rows)[0], most)
    else:
        size = collectives.all_max(tf.reduce_max(sizes))
    size = tf.maximum(size, 1)

    # Where each place comes from, and where each row goes.
    ends = tf.cumsum(sizes)
    starts = ends - sizes
    filled = tf.range(size) < sizes[:, None]
    source = tf.reshape(tf.where(filled, starts[:, None] + tf.range(size), 0), [-1])
    filled = tf.reshape(filled, [-1])
    row = tf.range(tf.shape(rows)[0])
    target = tf.searchsorted(ends, row, side="right")
    kept = target < num_replicas
    target = tf.where(kept, target, 0)
    place = tf.where(kept, target * size + row - tf.gather(starts, target), 0)
    sent = dispatch.rearrange(rows, source, place, filled, kept)
    received = _exchange(sent, num_replicas)

    counts = collectives.all_to_all(counts)
    expert = tf.searchsorted(
        tf.cumsum(counts, axis=1), tf.tile(tf.range(size)[None], [num_replicas, 1]), side="right"
    )
    expert = tf.reshape(expert, [-1, 1])
    valid = expert < counts.shape[1]
    plan = make_plan(
        Routing(tf.where(valid, expert, 0), tf.cast(valid, tf.float32), importance=None, load=None)
    )
    y = function(dispatch.dispatch(received, plan), plan)
    y = _exchange(dispatch.collect(y, plan), num_replicas)
    return dispatch.rearrange(y, place, source, kept, filled)[:num_rows]


def _exchange(rows, num_replicas):
    """[R·P, D] to the same, in the order of the replicas."""
    width = rows.shape[-1]
    pieces = tf.reshape(rows, [num_replicas, -1, width])
    return tf.reshape(collectives.all_to_all(pieces), [-1, width])
