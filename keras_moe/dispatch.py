"""The way of the rows to their experts and back. All code that needs TensorFlow itself is here.

Every example has K choices, so T examples make T·K rows. `make_plan` sorts them by expert;
`dispatch` brings the rows into that order, `split` cuts it into one piece per expert, `join` undoes
the cut. `combine` sums the rows of each example, weighted by the gates; `collect` brings them back
as they are. Rows of choices that count for nothing (gate 0) stand at the end and belong to no
expert. As the order is a permutation of all T·K rows, each gradient is again a gather: nothing is
scattered and nothing is sparse.
"""

from typing import NamedTuple

import tensorflow as tf


class Plan(NamedTuple):
    """Where each row goes.

    Attributes:
        example: int32 [T·K], the example that each sorted row is a copy of.
        choice: int32 [T·K], which of all choices (example·K + k) each sorted row is.
        position: int32 [T, K], where each choice stands among the sorted rows.
        rows_per_expert: int32 [N].
    """

    example: tf.Tensor
    choice: tf.Tensor
    position: tf.Tensor
    rows_per_expert: tf.Tensor


def make_plan(routing, num_experts):
    """Sorts the choices of a `Routing` by expert; earlier examples come first.

    Args:
        routing: A `Routing` of T examples with K choices each.
        num_experts: N.

    Returns:
        A `Plan`.
    """
    k = routing.expert_index.shape[1]
    # Not `gates == 0`: an example with NaN gates reaches no expert either.
    expert = tf.where(routing.gates > 0, routing.expert_index, num_experts)
    expert = tf.reshape(expert, [-1])
    choice = tf.argsort(expert, stable=True)
    position = tf.reshape(tf.math.invert_permutation(choice), [-1, k])
    counts = tf.math.bincount(expert, minlength=num_experts + 1, maxlength=num_experts + 1)
    rows_per_expert = tf.ensure_shape(counts[:num_experts], [num_experts])
    return Plan(choice // k, choice, position, rows_per_expert)


def dispatch(x, plan):
    """Copies each example once per choice, sorted by expert.

    Args:
        x: Float tensor [T, D].
        plan: A `Plan`.

    Returns:
        Float tensor [T·K, D].
    """

    @tf.custom_gradient
    def gather(x):
        def gradient(upstream):
            return _sum_over_choices(upstream, plan.position)

        return tf.gather(x, plan.example), gradient

    return gather(x)


def combine(rows, gates, plan):
    """Sums the rows of each example, weighted by its gates (equation 1).

    Args:
        rows: Float tensor [T·K, D], sorted by expert.
        gates: float32 tensor [T, K].
        plan: A `Plan`.

    Returns:
        Tensor [T, D] of the dtype of `rows`.
    """

    @tf.custom_gradient
    def weighted_sum(rows, gates):
        def gradient(upstream):
            # Both gradients need the upstream row of each choice, in the order of the rows.
            per_row = tf.gather(upstream, plan.example)
            weight = tf.gather(tf.reshape(gates, [-1]), plan.choice)
            per_choice = tf.reduce_sum(
                tf.cast(per_row, gates.dtype) * tf.cast(rows, gates.dtype), axis=-1
            )
            return (
                per_row * tf.cast(weight, rows.dtype)[:, None],
                tf.gather(per_choice, plan.position),
            )

        return _sum_over_choices(rows, plan.position, tf.cast(gates, rows.dtype)), gradient

    return weighted_sum(rows, gates)


def collect(rows, plan):
    """Brings the rows back into the order of the choices: undoes the sort.

    Args:
        rows: Float tensor [T·K, D], sorted by expert.
        plan: A `Plan`.

    Returns:
        Float tensor [T·K, D]: row t·K + k is that of choice k of example t.
    """

    @tf.custom_gradient
    def gather(rows):
        def gradient(upstream):
            return tf.gather(upstream, plan.choice)

        return tf.gather(rows, tf.reshape(plan.position, [-1])), gradient

    return gather(rows)


def split(rows, rows_per_expert):
    """Cuts sorted rows into one piece per expert.

    Args:
        rows: Tensor [M, D], sorted by expert.
        rows_per_expert: int32 [N], their sum at most M.

    Returns:
        A list of N tensors [rows of that expert, D], then the rest, which belongs to no expert.
    """
    rest = tf.shape(rows)[0] - tf.reduce_sum(rows_per_expert)
    sizes = tf.concat([rows_per_expert, rest[None]], axis=0)
    return tf.split(rows, sizes, num=sizes.shape[0])


def join(pieces, rest):
    """Undoes `split`; the rest, which no expert has seen, becomes zeros.

    Args:
        pieces: A list of N tensors [rows of that expert, D].
        rest: Tensor [R, any], the last piece that `split` returned.

    Returns:
        Tensor [M, D].
    """
    width = pieces[0].shape[-1]
    zeros = tf.zeros([tf.shape(rest)[0], width], pieces[0].dtype)
    return tf.concat([*pieces, zeros], axis=0)


def _sum_over_choices(rows, position, weights=None):
    """Sum over k of rows[position[:, k]], each times weights[:, k]: K gathers, no scatter."""
    total = None
    for k in range(position.shape[1]):
        term = tf.gather(rows, position[:, k])
        if weights is not None:
            term *= weights[:, k, None]
        total = term if total is None else total + term
    return total
