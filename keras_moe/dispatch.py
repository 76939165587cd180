"""The way of the rows to their experts and back.

Every example has K choices, so T examples make T·K rows. `make_plan` sorts them by expert;
`dispatch` brings the rows into that order, `combine` sums the rows of each example, weighted by the
gates; `collect` brings them back as they are. An order is always a permutation, or part of one, so
each gradient is again a gather: nothing is scattered and nothing is sparse.

There are two layouts. Without a capacity the rows stand close together, and those of choices that
count for nothing (gate 0) at the end, where they belong to no expert. With a capacity every expert
has C places, filled from the first; what finds no place is dropped and combines to zero.
"""

from typing import Any, NamedTuple

import tensorflow as tf


class Plan(NamedTuple):
    """Where each row goes. R rows: T·K without a capacity, N·C with one.

    Attributes:
        example: int32 [R], the example that each row is a copy of.
        choice: int32 [R], which of all choices (example·K + k) each row is.
        position: int32 [T, K], the row of each choice.
        rows_per_expert: int32 [N]; `None` with a capacity, where every expert has C rows.
        places: N and C, integers or int32 scalars; `None` without a capacity.
        filled: bool [R], `False` for an empty place; `None` without a capacity.
        kept: bool [T, K], whether the choice has a row; `None` without a capacity.
        fraction_dropped: float32 scalar, the part of the choices that found no place; `None`
            without a capacity.
    """

    example: Any
    choice: Any
    position: Any
    rows_per_expert: Any
    places: Any = None
    filled: Any = None
    kept: Any = None
    fraction_dropped: Any = None


def expert_capacity(factor, k, num_examples, num_experts):
    """C = min(T, ceil(factor·K·T / N)), the most rows of an expert.

    Args:
        factor: The capacity factor.
        k: K.
        num_examples: T, an integer, or an int32 scalar where the shape is not known yet.
        num_experts: N.

    Returns:
        An integer or an int32 scalar, as `num_examples`.
    """
    even_share = tf.cast(num_examples, tf.float64) * (factor * k) / num_experts
    capacity = tf.minimum(tf.cast(tf.math.ceil(even_share), tf.int32), num_examples)
    known = tf.get_static_value(capacity)
    return capacity if known is None else int(known)


def make_plan(routing, num_experts, capacity=None):
    """Sorts the choices of a `Routing` by expert.

    Of one expert's rows the first choices come first, then the second choices and so on; among
    those, earlier examples come first. So that is who gets a place where places are short.

    Args:
        routing: A `Routing` of T examples with K choices each.
        num_experts: N.
        capacity: C, the most rows of an expert, an integer or int32 scalar; `None` for any number.

    Returns:
        A `Plan`.
    """
    num_examples, k = _sizes(routing.expert_index)
    # Not `gates == 0`: an example with NaN gates reaches no expert either.
    expert = tf.where(routing.gates > 0, routing.expert_index, num_experts)
    expert = tf.reshape(tf.transpose(expert), [-1])  # all first choices, then all second ones, …
    order = tf.argsort(expert, stable=True)
    # A `bincount` that XLA compiles.
    counts = tf.math.unsorted_segment_sum(tf.ones_like(expert), expert, num_experts + 1)
    rows_per_expert = counts[:num_experts]
    # The place of each choice among the sorted ones. An `invert_permutation` that XLA compiles,
    # whatever the gating has done.
    place = tf.scatter_nd(order[:, None], tf.range(num_examples * k), [num_examples * k])

    if capacity is None:
        example, choice = _example_and_choice(order, num_examples, k)
        return Plan(example, choice, _per_example(place, k), rows_per_expert)

    # Rank r of expert i's rows stands at place first[i] + r of the sort, and goes to i·C + r.
    first = tf.cumsum(counts, exclusive=True)
    rank = place - tf.gather(first, expert)
    kept = tf.logical_and(expert < num_experts, rank < capacity)
    position = tf.where(kept, expert * capacity + rank, 0)
    within = tf.range(capacity)
    filled = within < rows_per_expert[:, None]  # [N, C]
    source = tf.where(filled, first[:num_experts, None] + within, 0)
    example, choice = _example_and_choice(
        tf.gather(order, tf.reshape(source, [-1])), num_examples, k
    )
    num_kept, num_alive = tf.math.count_nonzero(kept), tf.reduce_sum(rows_per_expert)
    fraction_kept = tf.cast(num_kept, tf.float32) / tf.cast(tf.maximum(num_alive, 1), tf.float32)
    return Plan(
        example=example,
        choice=choice,
        position=_per_example(position, k),
        rows_per_expert=None,
        places=(num_experts, capacity),
        filled=tf.reshape(filled, [-1]),
        kept=_per_example(kept, k),
        fraction_dropped=tf.where(num_alive > 0, 1.0 - fraction_kept, 0.0),
    )


def dispatch(x, plan):
    """Copies each example to the rows of its choices.

    Args:
        x: Float tensor [T, D].
        plan: A `Plan`.

    Returns:
        Float tensor [T·K, D], sorted by expert; with a capacity [N, C, D], zeros in empty places.
    """

    @tf.custom_gradient
    def gather(x):
        def gradient(upstream):
            return _sum_over_choices(upstream, plan)

        return take(x, plan.example, plan.filled), gradient

    rows = gather(x)
    return rows if plan.places is None else tf.reshape(rows, [*plan.places, x.shape[-1]])


def combine(rows, gates, plan):
    """Sums the rows of each example, weighted by its gates (equation 1).

    Args:
        rows: Float tensor [T·K, D] or [N, C, D], as `dispatch` laid them out.
        gates: float32 tensor [T, K].
        plan: A `Plan`.

    Returns:
        Tensor [T, D] of the dtype of `rows`.
    """

    @tf.custom_gradient
    def weighted_sum(rows, gates):
        def gradient(upstream):
            # Both gradients need the upstream row of each choice, in the order of the rows.
            per_row = take(upstream, plan.example, plan.filled)
            weight = take(tf.reshape(gates, [-1]), plan.choice, plan.filled)
            per_choice = tf.reduce_sum(
                tf.cast(per_row, gates.dtype) * tf.cast(rows, gates.dtype), axis=-1
            )
            return (
                per_row * tf.cast(weight, rows.dtype)[:, None],
                take(per_choice, plan.position, plan.kept),
            )

        return _sum_over_choices(rows, plan, tf.cast(gates, rows.dtype)), gradient

    return weighted_sum(tf.reshape(rows, [-1, rows.shape[-1]]), gates)


def collect(rows, plan):
    """Brings the rows back into the order of the choices: undoes the sort.

    Args:
        rows: Float tensor [T·K, D], sorted by expert.
        plan: A `Plan` without a capacity.

    Returns:
        Float tensor [T·K, D]: row t·K + k is that of choice k of example t.
    """
    return rearrange(rows, tf.reshape(plan.position, [-1]), plan.choice)


def rearrange(x, index, inverse, filled=None, kept=None):
    """Gathers the rows of `x`; the gradient gathers by the inverse.

    Args:
        x: Tensor [A, D].
        index: int32 [B], the row of `x` that each row of the result is.
        inverse: int32 [A], the row of the result that each row of `x` became.
        filled: bool [B] or `None`; zeros where `False`.
        kept: bool [A] or `None`; `False` for a row of `x` that the result leaves out.

    Returns:
        Tensor [B, D].
    """

    @tf.custom_gradient
    def gather(x):
        def gradient(upstream):
            return take(upstream, inverse, kept)

        return take(x, index, filled), gradient

    return gather(x)


def take(x, index, valid=None):
    """x[index] along the first axis, zeros where `valid` is `False` (whatever is in `x` there)."""
    taken = tf.gather(x, index)
    if valid is None:
        return taken
    if len(taken.shape) > len(valid.shape):
        valid = valid[..., None]
    return tf.where(valid, taken, tf.zeros([], taken.dtype))


def _sum_over_choices(rows, plan, weights=None):
    """Sum over k of rows[position[:, k]], each times weights[:, k]: K gathers, no scatter."""

    def term(k):
        kept = None if plan.kept is None else plan.kept[:, k]
        taken = take(rows, plan.position[:, k], kept)
        return taken if weights is None else taken * weights[:, k, None]

    if plan.position.shape[1] is not None:
        return sum((term(k) for k in range(1, plan.position.shape[1])), start=term(0))
    # The gating decides K anew for every batch.
    start = tf.zeros([tf.shape(plan.position)[0], rows.shape[-1]], rows.dtype)
    _, total = tf.while_loop(
        lambda k, _: k < tf.shape(plan.position)[1],
        lambda k, total: (k + 1, total + term(k)),
        (0, start),
    )
    return total


def _sizes(expert_index):
    """T and K, as integers where they are known."""
    shape = tf.shape(expert_index)
    return [shape[i] if size is None else size for i, size in enumerate(expert_index.shape)]


def _example_and_choice(index, num_examples, k):
    """Example t and choice t·K + k of each index k·T + t."""
    num_examples = tf.maximum(num_examples, 1)  # There may be no example, and no index then.
    example = index % num_examples
    return example, example * k + index // num_examples


def _per_example(values, k):
    """[K·T], all first choices first, to [T, K]."""
    return tf.transpose(tf.reshape(values, [k, -1]))
