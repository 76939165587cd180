"""Which row each choice of an example gets.

Every example has K choices, so T examples make T·K rows. `make_plan` gives each of them a position:
sorted by expert, and behind them those of choices that count for nothing (gate 0). Or, with a
capacity, each expert in turn has C places, filled from the first; what finds none is dropped, and
combines to zero.
"""

from typing import Any, NamedTuple

from keras import ops

from keras_moe.backend import indices, sorting


class Choices(NamedTuple):
    """What a plan asks of a `Routing`, which has the balance as well.

    Attributes:
        expert_index: int32 [T, K].
        gates: float32 [T, K].
    """

    expert_index: Any
    gates: Any


class Plan(NamedTuple):
    """Where each row goes: R rows, T·K or, with a capacity, N·C.

    Attributes:
        example: integer [R], the example that each row is a copy of; T for an empty place.
        choice: integer [R], which of all choices (example·K + k) each row is; T·K for an empty
            place.
        position: integer [T, K], the row of each choice.
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
        routing: A `Routing`, or `Choices`, of T examples with K choices each.
        num_experts: N.
        capacity: C, the places of each expert, an integer or int32 scalar; rows without one are
            dropped. Default: each expert has as many as it has rows.

    Returns:
        A `Plan`.
    """
    num_examples, k = ops.shape(routing.gates)
    num_choices = num_examples * k
    # Not `gates == 0`: an example with NaN gates reaches no expert either.
    expert = ops.where(
        routing.gates > 0, ops.cast(routing.expert_index, indices.INDEX), num_experts
    )
    expert = ops.reshape(ops.transpose(expert), (-1,))  # all first choices, then all second ones, …
    order, row, counts = sorting.sort(expert, num_experts + 1)
    if capacity is None:
        position, rows_per_expert, kept, fraction_dropped = row, counts[:-1], None, None
        rows_per_expert = ops.cast(rows_per_expert, "int32")  # as banks of experts are called
    else:
        places = ops.cast(capacity, indices.INDEX)
        rank, num_rows = _rank(row, expert, counts), num_experts * places
        has_place = ops.logical_and(rank < places, expert < num_experts)
        place = expert * places + rank
        # One row more, for all that have none.
        row = ops.where(has_place, place, num_rows)
        position = ops.where(has_place, place, ops.zeros((), indices.INDEX))
        order = indices.placed(
            order, indices.gather(row, order), num_experts * capacity + 1, num_choices
        )[:-1]
        rows_per_expert, kept = None, _per_example(has_place, k)
        beyond = ops.maximum(counts[:-1] - places, ops.zeros((), indices.INDEX))
        fraction_dropped = fraction(beyond, counts[:-1])

    divisor = ops.cast(
        indices.at_least(1, num_examples), indices.INDEX
    )  # There may be no example, and no row.
    example = order % divisor
    choice = example * ops.cast(k, indices.INDEX) + order // divisor
    if capacity is not None:
        is_empty = order == ops.cast(num_choices, indices.INDEX)
        example = ops.where(is_empty, ops.cast(num_examples, indices.INDEX), example)
        choice = ops.where(is_empty, ops.cast(num_choices, indices.INDEX), choice)

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
    expert = ops.cast(expert, indices.INDEX)
    _, row, counts = sorting.sort(expert, num_experts)
    return ops.cast(_rank(row, expert, counts), "int32"), ops.cast(counts, "int32")


def fraction(part, whole):
    """The sum of `part` over that of `whole`, 0 where there is nothing."""
    part, whole = (ops.cast(ops.sum(x), "float32") for x in (part, whole))
    return part / ops.maximum(whole, 1.0)


def _rank(row, expert, counts):
    return row - indices.gather(ops.cumsum(counts, axis=0) - counts, expert)


def _per_example(values, k):
    """[K·T], all first choices first, to [T, K]."""
    return ops.transpose(ops.reshape(values, (k, -1)))
