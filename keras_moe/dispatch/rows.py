"""The way of the rows to their experts and back, as a `Plan` has it.

`dispatch` brings the rows into position, `combine` sums the rows of each example, weighted by the
gates; `collect` brings them back as they are. Each of these is a gather whose inverse is known, so
each gradient is again a gather: nothing is scattered and nothing is sparse.
"""

from keras import ops

from keras_moe.backend import devices, gradients, indices


def dispatch(x, plan):
    """Copies each example to the rows of its choices.

    Args:
        x: Float tensor [T, D].
        plan: A `Plan`.

    Returns:
        Float tensor [R, D]; with a capacity [N, C, D], zeros in empty places.
    """
    rows = gradients.with_gradient(
        lambda x, plan: _take_rows(x, plan.example, plan),
        lambda upstream, x, plan: [_sum_over_choices(upstream, plan)],
        [x],
        [plan],
    )
    if plan.rows_per_expert is not None:
        return rows
    return ops.reshape(rows, (plan.num_experts, plan.capacity, x.shape[-1]))


def combine(rows, gates, plan):
    """Sums the rows of each example, weighted by its gates (equation 1).

    Args:
        rows: Float tensor [R, D] or [N, C, D], as `dispatch` laid them out.
        gates: float32 tensor [T, K].
        plan: A `Plan`.

    Returns:
        Tensor [T, D] of the dtype of `rows`.
    """

    def weighted_sum(rows, gates, plan):
        return _sum_over_choices(rows, plan, ops.cast(gates, rows.dtype))

    def gradient(upstream, rows, gates, plan):
        # Both gradients need the upstream row of each choice, in the order of the rows.
        per_row = _take_rows(upstream, plan.example, plan)
        weight = _take_rows(ops.reshape(gates, (-1, 1)), plan.choice, plan)
        per_choice = ops.sum(ops.cast(per_row, gates.dtype) * ops.cast(rows, gates.dtype), axis=-1)
        of_rows = per_row * ops.cast(weight, rows.dtype)
        return [of_rows, take(per_choice, plan.position, plan.kept)]

    rows = ops.reshape(rows, (-1, rows.shape[-1]))
    return gradients.with_gradient(weighted_sum, gradient, [rows, gates], [plan])


def collect(rows, plan):
    """Brings the rows back into the order of the choices.

    Args:
        rows: Float tensor [R, D] or [N, C, D], as `dispatch` laid them out.
        plan: A `Plan`.

    Returns:
        Float tensor [T·K, D]: row t·K + k is that of choice k of example t, zeros if it is dropped.
    """

    def by_choice(rows, plan):
        kept = None if plan.kept is None else ops.reshape(plan.kept, (-1,))
        return take(rows, ops.reshape(plan.position, (-1,)), kept)

    return gradients.with_gradient(
        by_choice,
        lambda upstream, rows, plan: [_take_rows(upstream, plan.choice, plan)],
        [ops.reshape(rows, (-1, rows.shape[-1]))],
        [plan],
    )


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
    return gradients.with_gradient(
        lambda x, there, back: take(x, *there),
        lambda upstream, x, there, back: [take(upstream, *back)],
        [x],
        [(index, filled), (inverse, kept)],
    )


def of_one_example(routing):
    """Experts of a single example, [K], 0 for a choice that counts for nothing, and the gates."""
    gates = routing.gates[0]
    expert = ops.cast(routing.expert_index, indices.INDEX)[0]
    return ops.where(gates > 0, expert, ops.zeros((), indices.INDEX)), gates


def as_batch(row):
    """A row [1, D] as the result of a branch for one example, beside a branch for more.

    TensorFlow's graph optimizer believes what the operations of either branch say about the shapes
    of both (seen with 2.21). So none may imply that there is one example: the branch takes slices
    of its inputs, and this takes a slice of the gradient.
    """
    return gradients.with_gradient(devices.same, lambda upstream, row: [upstream[:1]], [row])


def take(x, index, valid=None):
    """x[index] along the first axis, zeros where `valid` is `False` (whatever is in `x` there)."""
    taken = indices.gather(x, index)
    if valid is None:
        return taken
    if len(taken.shape) > len(valid.shape):
        valid = valid[..., None]
    return ops.where(valid, taken, ops.zeros((), taken.dtype))


def _sum_over_choices(rows, plan, weights=None):
    """Sum over k of rows[position[:, k]], each times weights[:, k]: gathers, no scatter."""

    def term(k):
        kept = None if plan.kept is None else plan.kept[:, k]
        taken = take(devices.densified(rows), plan.position[:, k], kept)
        return taken if weights is None else taken * weights[:, k, None]

    def one_by_one():
        num_examples, k = ops.shape(plan.position)
        if isinstance(k, int):
            return sum((term(i) for i in range(1, k)), start=term(0))
        # The gating decides K anew for every batch.
        start = ops.zeros((num_examples, rows.shape[-1]), rows.dtype)
        _, total = ops.while_loop(
            lambda i, _: i < k, lambda i, total: (i + 1, total + term(i)), (0, start)
        )
        return total

    def at_once():
        taken = take(devices.densified(rows), plan.position, plan.kept)
        return ops.sum(taken if weights is None else taken * weights[..., None], axis=1)

    return devices.by_device(one_by_one, at_once)


def _take_rows(x, index, plan):
    """x[index], zeros where `index` is that of the row behind the last one."""
    if plan.capacity is None:  # There are no empty places.
        return indices.gather(x, index)
    zeros = ops.zeros((1, x.shape[-1]), x.dtype)
    return indices.gather(ops.concatenate([x, zeros]), index)
