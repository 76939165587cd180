"""The way of the rows to their experts and back, as a `Plan` has it.

`dispatch` brings the rows into position, `combine` sums the rows of each example, weighted by the
gates; `collect` brings them back as they are. Each of these is a gather whose inverse is known, so
each gradient is again a gather: nothing is scattered and nothing is sparse.
"""

import tensorflow as tf

from keras_moe.dispatch.devices import by_device, densified


def dispatch(x, plan):
    """Copies each example to the rows of its choices.

    Args:
        x: Float tensor [T, D].
        plan: A `Plan`.

    Returns:
        Float tensor [R, D]; with a capacity [N, C, D], zeros in empty places.
    """

    @tf.custom_gradient
    def gather(x):
        def gradient(upstream):
            return _sum_over_choices(upstream, plan)

        return _take_rows(x, plan.example, plan), gradient

    rows = gather(x)
    if plan.rows_per_expert is not None:
        return rows
    return tf.reshape(rows, [plan.num_experts, plan.capacity, x.shape[-1]])


def combine(rows, gates, plan):
    """Sums the rows of each example, weighted by its gates (equation 1).

    Args:
        rows: Float tensor [R, D] or [N, C, D], as `dispatch` laid them out.
        gates: float32 tensor [T, K].
        plan: A `Plan`.

    Returns:
        Tensor [T, D] of the dtype of `rows`.
    """

    @tf.custom_gradient
    def weighted_sum(rows, gates):
        def gradient(upstream):
            # Both gradients need the upstream row of each choice, in the order of the rows.
            per_row = _take_rows(upstream, plan.example, plan)
            weight = _take_rows(tf.reshape(gates, [-1, 1]), plan.choice, plan)
            per_choice = tf.reduce_sum(
                tf.cast(per_row, gates.dtype) * tf.cast(rows, gates.dtype), axis=-1
            )
            return (
                per_row * tf.cast(weight, rows.dtype),
                take(per_choice, plan.position, plan.kept),
            )

        return _sum_over_choices(rows, plan, tf.cast(gates, rows.dtype)), gradient

    return weighted_sum(tf.reshape(rows, [-1, rows.shape[-1]]), gates)


def collect(rows, plan):
    """Brings the rows back into the order of the choices.

    Args:
        rows: Float tensor [R, D] or [N, C, D], as `dispatch` laid them out.
        plan: A `Plan`.

    Returns:
        Float tensor [T·K, D]: row t·K + k is that of choice k of example t, zeros if it is dropped.
    """

    @tf.custom_gradient
    def gather(rows):
        def gradient(upstream):
            return _take_rows(upstream, plan.choice, plan)

        kept = None if plan.kept is None else tf.reshape(plan.kept, [-1])
        return take(rows, tf.reshape(plan.position, [-1]), kept), gradient

    return gather(tf.reshape(rows, [-1, rows.shape[-1]]))


def rearrange(x, index, inverse, filled=None, kept=None):
    """Gathers the rows of `x`; the gradient gathers by the inverse.

    Args:
        x: Tensor [A, D].
        index: Integer tensor [B], the row of `x` that each row of the result is.
        inverse: Integer tensor [A], the row of the result that each row of `x` became.
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


def of_one_example(routing):
    """Experts of a single example, int64 [K], 0 for a choice that counts for nothing, and gates."""
    gates = routing.gates[0]
    expert = tf.cast(routing.expert_index, tf.int64)[0]
    return tf.where(gates > 0, expert, tf.zeros([], tf.int64)), gates


def as_batch(row):
    """A row [1, D] as the result of a branch for one example, beside a branch for more.

    TensorFlow's graph optimizer believes what the operations of either branch say about the shapes
    of both (seen with 2.21). So none may imply that there is one example: the branch takes slices
    of its inputs, and this takes a slice of the gradient.
    """

    @tf.custom_gradient
    def call(row):
        return tf.identity(row), lambda upstream: upstream[:1]

    return call(row)


def take(x, index, valid=None):
    """x[index] along the first axis, zeros where `valid` is `False` (whatever is in `x` there)."""
    taken = tf.gather(x, index)
    if valid is None:
        return taken
    if len(taken.shape) > len(valid.shape):
        valid = valid[..., None]
    return tf.where(valid, taken, tf.zeros([], taken.dtype))


def spread(table, index):
    """table[index] along the first axis. Each row's gradient is a sum, and all of it dense."""
    index = tf.identity(index)  # The gradient closes over it: see `devices.captured`.

    @tf.custom_gradient
    def gather(table):
        def gradient(upstream):
            return tf.math.unsorted_segment_sum(upstream, index, table.shape[0])

        return tf.gather(table, index), gradient

    return gather(tf.convert_to_tensor(table))


def _sum_over_choices(rows, plan, weights=None):
    """Sum over k of rows[position[:, k]], each times weights[:, k]: gathers, no scatter."""

    def term(k):
        kept = None if plan.kept is None else plan.kept[:, k]
        taken = take(densified(rows), plan.position[:, k], kept)
        return taken if weights is None else taken * weights[:, k, None]

    def one_by_one():
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

    def at_once():
        taken = take(densified(rows), plan.position, plan.kept)
        return tf.reduce_sum(taken if weights is None else taken * weights[..., None], axis=1)

    return by_device(one_by_one, at_once)


def _take_rows(x, index, plan):
    """x[index], zeros where `index` is that of the row behind the last one."""
    if plan.capacity is None:  # There are no empty places.
        return tf.gather(x, index)
    zeros = tf.zeros([1, x.shape[-1]], x.dtype)
    return tf.gather(tf.concat([x, zeros], axis=0), index)
