"""The way of the rows to the replicas that hold their experts, and back."""

from typing import Any, NamedTuple

import tensorflow as tf

from keras_moe import dispatch
from keras_moe.backend import collectives
from keras_moe.backend.tensorflow import replicas as internals
from keras_moe.backend.tensorflow import xla

_ROUNDS = 4  # under XLA, if every two replicas have as many rows for each other as they may


class _Runs(NamedTuple):
    """Rows sorted by the replica that they go to or come from.

    Attributes:
        sizes: int32 [R], the rows of each replica.
        number: The number of all rows. Those behind the last replica's belong to none.
    """

    sizes: Any
    number: Any


class _Choices(NamedTuple):
    """What a plan asks of a `Routing`, of which this module knows nothing else."""

    expert_index: Any
    gates: Any


def on_their_replicas(function, rows, rows_per_expert, make_plan, most=None):
    """Applies a function to rows on the replicas that hold the rows' experts.

    Replica r of R holds n = N/R experts, from r·n. All send each other as many rows: as many as the
    one of most for another has. Where XLA compiles, shapes can't depend on the data, and they send
    a part of the even share in a round, and play as many rounds as it takes.

    Args:
        function: Called with the rows of all replicas for this replica's experts and their `Plan`;
            returns them with another width.
        rows: Float tensor [M, D], sorted by expert.
        rows_per_expert: int32 [N]. Rows behind those belong to no expert, and come back as zeros.
        make_plan: Function from what a `Routing` says of rows to n experts, `expert_index` and
            `gates`, to their `Plan`.
        most: The most rows that a replica can receive, the same number on all; XLA needs to know.
            Default: R·M, all rows of all.

    Returns:
        Float tensor [M, width], the rows in the order in which they were given.
    """
    num_replicas, num_rows = collectives.num_replicas(), tf.shape(rows)[0]
    counts = tf.reshape(rows_per_expert, [num_replicas, -1])
    theirs = collectives.all_to_all(counts)  # [R, n]: how many rows from r for each expert here
    sent = _Runs(tf.reduce_sum(counts, axis=1), num_rows)
    received = _Runs(tf.reduce_sum(theirs, axis=1), tf.reduce_sum(theirs))
    largest = collectives.all_max(tf.reduce_max(sent.sizes))
    size, rounds = tf.maximum(largest, 1), None
    if xla.compiling():
        received = received._replace(number=num_replicas * num_rows if most is None else most)
        size = tf.maximum(-(-received.number // (_ROUNDS * num_replicas)), 1)
        rounds = -(-largest // size)

    # The rows from one replica are sorted by expert, and so is their number.
    kind = tf.searchsorted(
        tf.cumsum(tf.reshape(theirs, [-1])), tf.range(received.number), side="right"
    )
    valid = kind < tf.size(theirs)
    expert = tf.where(valid, kind % counts.shape[1], 0)[:, None]
    plan = make_plan(_Choices(expert, tf.cast(valid[:, None], tf.float32)))
    rows = dispatch.dispatch(_move(rows, sent, received, size, rounds), plan)
    y = dispatch.collect(function(rows, plan), plan)
    return _move(y, received, sent, size, rounds)


def _move(x, sent, received, size, rounds):
    """Sends rows [sent.number, D] and returns those received, [received.number, D].

    In each round each replica sends `size` rows to each; `None` for a single round. The gradient
    takes the same way back.
    """
    num_replicas, width = sent.sizes.shape[0], x.shape[-1]
    first = tf.cumsum(sent.sizes, exclusive=True)
    ends = tf.cumsum(received.sizes)
    row = tf.range(received.number)
    replica = tf.searchsorted(ends, row, side="right")  # R for a row of none
    valid, replica = replica < num_replicas, tf.minimum(replica, num_replicas - 1)
    rank = row - tf.gather(ends - received.sizes, replica)

    def play(i, x, y):
        index = i * size + tf.range(size)
        filled = index < sent.sizes[:, None]
        pieces = dispatch.take(x, tf.where(filled, first[:, None] + index, 0), filled)
        pieces = tf.reshape(internals.all_to_all(pieces), [-1, width])
        place = rank - i * size
        here = valid & (place >= 0) & (place < size)
        taken = tf.gather(pieces, tf.where(here, replica * size + place, 0))
        return tf.where(here[:, None], taken, y)

    @tf.custom_gradient
    def move(x):
        def gradient(upstream):
            return _move(upstream, received, sent, size, rounds)

        # Zeros are taken from some row, so there has to be one.
        x = tf.pad(x, [[0, tf.maximum(1 - tf.shape(x)[0], 0)], [0, 0]])
        y = tf.zeros([received.number, width], x.dtype)
        if rounds is None:
            return play(0, x, y), gradient
        _, y = tf.while_loop(
            lambda i, _: i < rounds,
            lambda i, y: (i + 1, play(i, x, y)),
            (0, y),
            parallel_iterations=1,  # The collectives of all replicas come in the same order.
        )
        return y, gradient

    return move(x)
