"""Rows of experts in batches: the way of GPUs, where a few large operations cost less than many.

The sorted rows are copied to blocks of S places, half as many again as the mean load. The first N
blocks are one for each expert; an expert with more rows than places gets further blocks behind
those, each with a copy of its matrix. All products with a bank so are one batched product, and a
second one, which runs only where there are further blocks. Zeros fill the empty places.

Shapes are static: an expert with c rows takes ceil(c / S) - 1 further blocks, fewer than c / S, so
that M / S are enough for every load.

Eagerly JAX would compile a branch anew at each call, so what has one is compiled as a whole.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from keras_moe.backend.jax.gradients import with_gradient
from keras_moe.backend.jax.indices import INDEX, at_least, at_most, gather, index_range, run_of


class Places(NamedTuple):
    """Where the rows of N experts are: G ≥ N blocks of S places.

    Attributes:
        row: int32 [G, S], the row in each place, -1 in an empty one.
        place: int32 [M], the place of each row, -1 for a row of no expert.
        owner: int32 [G - N], whose the further blocks are.
        has_further: Boolean scalar, whether there is a row in those.
    """

    row: Any
    place: Any
    owner: Any
    has_further: Any


def make_places(rows_per_expert, num_rows):
    """Lays out the rows of N experts.

    Args:
        rows_per_expert: int32 [N].
        num_rows: M. Rows behind those belong to no expert.

    Returns:
        `Places`.
    """
    num_experts = rows_per_expert.shape[0]
    ends = jnp.cumsum(rows_per_expert)
    starts = ends - rows_per_expert
    size = at_least(1, at_most(num_rows, -(-3 * num_rows // (2 * num_experts))))
    further = jnp.maximum(-(-rows_per_expert // size) - 1, 0)
    last = jnp.cumsum(further)
    first = last - further

    index = index_range(num_rows // size if num_experts > 1 else 0)
    owner = jnp.minimum(run_of(last, index), num_experts - 1)
    nth = 1 - first[owner] + index
    begin = jnp.concatenate([starts, starts[owner] + nth * size])
    end = jnp.concatenate([ends, ends[owner]])
    row = begin[:, None] + index_range(size)
    row = jnp.where(row < end[:, None], row, -1)

    index = index_range(num_rows)
    expert = run_of(ends, index)
    nobodys = expert == num_experts
    expert = jnp.minimum(expert, num_experts - 1)
    rank = index - starts[expert]
    nth = rank // size
    block = jnp.where(nth > 0, num_experts - 1 + first[expert] + nth, expert)
    place = jnp.where(nobodys, -1, block * size + rank % size)
    return Places(row, place.astype(INDEX), owner, last[-1] > 0)


def arrange(rows, places):
    """Copies rows [M, D] to their places: [G·S, D], zeros in empty ones."""
    return _moved(rows, places.row.reshape(-1), places.place)


def restore(rows, places):
    """Brings rows [G·S, D] back from their places: [M, D], zeros for those of no expert."""
    return _moved(rows, places.place, places.row.reshape(-1))


def _moved(rows, index, inverse):
    def there(rows, index, inverse):
        return jnp.where(index[:, None] < 0, jnp.zeros((), rows.dtype), gather(rows, index))

    def back(upstream, rows, index, inverse):
        return [there(upstream, inverse, index)]

    return with_gradient(there, back, [rows], [index, inverse])


def multiply(rows, kernel, places, precision=None):
    """The product of rows in their places [G·S, D] and the matrices of their experts [N, D, F]."""

    def product(rows, kernel, places):
        return _times(rows, kernel.astype(rows.dtype), places, precision)

    def gradient(upstream, rows, kernel, places):
        of_rows = _times(upstream, jnp.swapaxes(kernel, 1, 2).astype(rows.dtype), places)
        if not jnp.issubdtype(kernel.dtype, jnp.floating):  # int8
            return [of_rows, None]
        of_kernel = gradient_of_kernel(rows, upstream, places, kernel.shape[0])
        return [of_rows, of_kernel.astype(kernel.dtype)]

    return with_gradient(product, gradient, [rows, kernel], [places])


@functools.partial(jax.jit, static_argnames="precision")
def _times(rows, kernel, places, precision=None):
    blocks, num_experts = _blocks(rows, places), kernel.shape[0]

    def further(others):
        return jnp.matmul(others, gather(kernel, places.owner), precision=precision)

    def nothing(others):
        return jnp.zeros((*others.shape[:-1], kernel.shape[-1]), others.dtype)

    first = jnp.matmul(blocks[:num_experts], kernel, precision=precision)
    others = jax.lax.cond(places.has_further, further, nothing, blocks[num_experts:])
    return jnp.concatenate([first, others]).reshape(-1, kernel.shape[-1])


@functools.partial(jax.jit, static_argnames="num_experts")
def gradient_of_kernel(rows, upstream, places, num_experts):
    """[N, D, F]: of each expert the sum of its rows' products with their gradients."""
    rows, upstream = (_blocks(x, places) for x in (rows, upstream))
    sums = jnp.swapaxes(rows[:num_experts], 1, 2) @ upstream[:num_experts]

    def further(sums):
        others = jnp.swapaxes(rows[num_experts:], 1, 2) @ upstream[num_experts:]
        return sums.at[places.owner].add(others)

    return jax.lax.cond(places.has_further, further, lambda sums: sums, sums)


def spread(table, places):
    """The rows of a table [N, F] in each place: [G·S, F]."""
    each = jnp.concatenate([table, gather(table, places.owner)])
    each = jnp.broadcast_to(each[:, None], (*places.row.shape, table.shape[-1]))
    return each.reshape(-1, table.shape[-1])


def _blocks(rows, places):
    return rows.reshape(*places.row.shape, rows.shape[-1])
