"""The way of the rows to the replicas that hold their experts, and back."""

from typing import Any, NamedTuple

from keras import ops

from keras_moe import dispatch
from keras_moe.backend import collectives, gradients, indices

_ROUNDS = 4  # of static shapes, if every two replicas have as many rows as they may for each other


class _Runs(NamedTuple):
    """Rows sorted by the replica that they go to or come from.

    Attributes:
        sizes: int32 [R], the rows of each replica.
        number: The number of all rows. Those behind the last replica's belong to none.
    """

    sizes: Any
    number: Any


def on_their_replicas(function, rows, rows_per_expert, make_plan, most=None):
    """Applies a function to rows on the replicas that hold the rows' experts.

    Replica r of R holds n = N/R experts, from r·n. All send each other as many rows: as many as the
    one of most for another has. Where shapes can't depend on the data, they send a part of the even
    share in a round, and play as many rounds as it takes.

    Args:
        function: Called with the rows of all replicas for this replica's experts and their `Plan`;
            returns them with another width.
        rows: Float tensor [M, D], sorted by expert.
        rows_per_expert: int32 [N]. Rows behind those belong to no expert, and come back as zeros.
        make_plan: Function from what a `Routing` says of rows to n experts, `expert_index` and
            `gates`, to their `Plan`.
        most: The most rows that a replica can receive, the same number on all; for static shapes.
            Default: R·M, all rows of all.

    Returns:
        Float tensor [M, width], the rows in the order in which they were given.
    """
    num_replicas, num_rows = collectives.num_replicas(), ops.shape(rows)[0]
    counts = ops.reshape(rows_per_expert, (num_replicas, -1))
    theirs = collectives.all_to_all(counts)  # [R, n]: how many rows from r for each expert here
    sent = _Runs(ops.sum(counts, axis=1), num_rows)
    received = _Runs(ops.sum(theirs, axis=1), ops.sum(theirs))
    largest = collectives.all_max(ops.max(sent.sizes))
    size, rounds = ops.maximum(largest, 1), None
    if collectives.static_shapes():
        received = received._replace(number=num_replicas * num_rows if most is None else most)
        # No replica has more than M rows for all others, however many it may receive.
        share = indices.at_most(2 * num_rows, received.number)
        size = indices.at_least(1, -(-share // (_ROUNDS * num_replicas)))
        rounds = -(-largest // size)

    # The rows from one replica are sorted by expert, and so is their number.
    kind = _run_of_row(ops.cumsum(ops.reshape(theirs, (-1,)), axis=0), received.number)
    valid = kind < num_replicas * counts.shape[1]
    expert = ops.where(valid, kind % counts.shape[1], 0)[:, None]
    plan = make_plan(dispatch.Choices(expert, ops.cast(valid[:, None], "float32")))
    rows = dispatch.dispatch(_move(rows, sent, received, size, rounds), plan)
    y = dispatch.collect(function(rows, plan), plan)
    return _move(y, received, sent, size, rounds)


def _move(x, sent, received, size, rounds):
    """Sends rows [sent.number, D] and returns those received, [received.number, D].

    In each round each replica sends `size` rows to each; `None` for a single round. The gradient
    takes the same way back.
    """
    return gradients.with_gradient(
        lambda x, *way: _moved(x, *way),
        lambda upstream, x, sent, received, *rest: [_moved(upstream, received, sent, *rest)],
        [x],
        [sent, received, size, rounds],
    )


def _moved(x, sent, received, size, rounds):
    num_replicas, width = sent.sizes.shape[0], x.shape[-1]
    first = ops.cumsum(sent.sizes, axis=0) - sent.sizes
    ends = ops.cumsum(received.sizes, axis=0)
    replica = _run_of_row(ends, received.number)  # R for a row of none
    valid, replica = replica < num_replicas, ops.minimum(replica, num_replicas - 1)
    rank = _range(received.number) - indices.gather(ends - received.sizes, replica)

    def play(i, y):
        index = i * size + _range(size)
        filled = index < sent.sizes[:, None]
        pieces = dispatch.take(x, ops.where(filled, first[:, None] + index, 0), filled)
        pieces = ops.reshape(collectives.all_to_all(pieces), (-1, width))
        place = rank - i * size
        here = ops.logical_and(valid, ops.logical_and(place >= 0, place < size))
        taken = indices.gather(pieces, ops.where(here, replica * size + place, 0))
        return ops.where(here[:, None], taken, y)

    # Zeros are taken from some row, so there has to be one.
    x = ops.pad(x, [[0, indices.at_least(0, 1 - ops.shape(x)[0])], [0, 0]])
    y = ops.zeros((received.number, width), x.dtype)
    return play(0, y) if rounds is None else collectives.in_turn(rounds, play, y)


def _run_of_row(ends, number):
    """Which run each of `number` rows is in, by the ends of all runs; their number for none."""
    return ops.cast(indices.run_of(ends, _range(number)), "int32")


def _range(number):
    return ops.arange(number, dtype="int32")
