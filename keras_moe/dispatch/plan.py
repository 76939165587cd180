"""Which row each choice of an example gets.

Every example has K choices, so T examples make T·K rows. `make_plan` gives each of them a position:
sorted by expert, and behind them those of choices that count for nothing (gate 0). Or, with a
capacity, each expert in turn has C places, filled from the first; what finds none is dropped, and
combines to zero.
"""

from typing import Any, NamedTuple

import tensorflow as tf

from keras_moe.dispatch.sorting import sort
from keras_moe.dispatch.vectorization import turn_by_turn


class Plan(NamedTuple):
    """Where each row goes: R rows, T·K or, with a capacity, N·C.

    Attributes:
        example: int64 [R], the example that each row is a copy of; T for an empty place.
        choice: int64 [R], which of all choices (example·K + k) each row is; T·K for an empty place.
        position: int64 [T, K], the row of each choice.
        rows_per_expert: int32 [N]; `None` with a capacity, as then each has C.
        num_experts: N.
        capacity: C, an integer or int32 scalar, or `None`.
        kept: bool [T, K], whether the choice has a row; `None` where nothing is dropped.
        fraction_dropped: float32 scalar, the part of the choices that found no place; `None`
            where nothing is dropped.
    """

    example: Any
    choice: Any
    position: Any
    rows_per_expert: Any
    num_experts: int
    capacity: Any
    kept: Any = None
    fraction_dropped: Any = None


def make_plan(routing, num_experts, capacity=None):
    """Gives each choice of a `Routing` its row.

    Of one expert's rows the first choices come first, then the second choices and so on; among
    those, earlier examples come first. So that is who gets a place where places are short.

    Args:
        routing: A `Routing` of T examples with K choices each.
        num_experts: N.
        capacity: C, the places of each expert, an integer or int32 scalar; rows without one are
            dropped. Default: each expert has as many as it has rows.

    Returns:
        A `Plan`.
    """
    num_examples, k = _sizes(routing.gates)
    num_choices = num_examples * k
    # Not `gates == 0`: an example with NaN gates reaches no expert either.
    expert = tf.where(routing.gates > 0, tf.cast(routing.expert_index, tf.int64), num_experts)
    expert = tf.reshape(tf.transpose(expert), [-1])  # all first choices, then all second ones, …
    order, row, counts = sort(expert, num_experts + 1)
    if capacity is None:
        position, rows_per_expert, kept, fraction_dropped = row, counts[:-1], None, None
        rows_per_expert = tf.cast(rows_per_expert, tf.int32)  # as banks of experts are called
    else:
        places = tf.cast(capacity, tf.int64)
        rank, num_rows = _rank(row, expert, counts), num_experts * places
        has_place = tf.logical_and(rank < places, expert < num_experts)
        place = expert * places + rank
        # One row more, for all that have none.
        row = tf.where(has_place, place, num_rows)
        position = tf.where(has_place, place, tf.zeros([], tf.int64))
        empty = tf.fill([num_experts * capacity + 1], tf.cast(num_choices, tf.int64))
        order = tf.tensor_scatter_nd_update(empty, tf.gather(row, order)[:, None], order)
        order = turn_by_turn(order)[:-1]
        rows_per_expert, kept = None, _per_example(has_place, k)
        fraction_dropped = fraction(tf.maximum(counts[:-1] - places, 0), counts[:-1])

    divisor = tf.cast(tf.maximum(num_examples, 1), tf.int64)  # There may be no example, and no row.
    example = order % divisor
    choice = example * tf.cast(k, tf.int64) + order // divisor
    if capacity is not None:
        is_empty = order == tf.cast(num_choices, tf.int64)
        example = tf.where(is_empty, tf.cast(num_examples, tf.int64), example)
        choice = tf.where(is_empty, tf.cast(num_choices, tf.int64), choice)

    return Plan(
        example=example,
        choice=choice,
        position=_per_example(position, k),
        rows_per_expert=rows_per_expert,
        num_experts=num_experts,
        capacity=capacity,
        kept=kept,
        fraction_dropped=fraction_dropped,
    )


def ranks(expert, num_experts):
    """Of each row its number among the rows of its expert, and how many rows each expert has."""
    expert = tf.cast(expert, tf.int64)
    _, row, counts = sort(expert, num_experts)
    return tf.cast(_rank(row, expert, counts), tf.int32), tf.cast(counts, tf.int32)


def fraction(part, whole):
    """The sum of `part` over that of `whole`, 0 where there is nothing."""
    part, whole = (tf.cast(tf.reduce_sum(x), tf.float32) for x in (part, whole))
    return part / tf.maximum(whole, 1.0)


def _rank(row, expert, counts):
    return row - tf.gather(tf.cumsum(counts, exclusive=True), expert)


def _sizes(gates):
    """T and K, as integers where they are known."""
    shape = tf.shape(gates)
    return [shape[i] if size is None else size for i, size in enumerate(gates.shape)]


def _per_example(values, k):
    """[K·T], all first choices first, to [T, K]."""
    return tf.transpose(tf.reshape(values, [k, -1]))
