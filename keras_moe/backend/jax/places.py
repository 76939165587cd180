"""Rows of experts in batches: the way of GPUs, where a few large operations cost less than many.

The sorted rows are copied to blocks of S places, more than the mean load. The first N blocks are
one for each expert, and computed in one batch. An expert with more rows than places gets
further blocks, each with a copy of its parameters; a loop computes those, several at a time and
only as many as there are. Zeros fill the empty places.

Shapes are static: an expert with c rows takes floor((c - 1) / S) further blocks, so that
(M - 1) / S are enough for every load.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from keras_moe.backend.jax.gradients import with_gradient
from keras_moe.backend.jax.indices import INDEX, at_least, at_most, gather, index_range, run_of

# S has room for an eighth more than the mean load, or 16 rows: chance moves a large load by a small
# part of it. Cards compute tiles of 128 rows and more, of which multiples of 64 waste few. Where a
# matrix is read for few rows, empty places should cost little.
_TILE = 64
_SPARE = 16
_TURNS = 8  # of the loop, if all further blocks that there can be have rows


class Blocks(NamedTuple):
    """Rows of experts in B blocks of S places.

    Attributes:
        row: int32 [B, S], the row in each place, -1 in an empty one.
        owner: int32 [B], the expert of each block.
    """

    row: Any
    owner: Any


class Places(NamedTuple):
    """Where the rows of N experts are.

    Attributes:
        first: `Blocks`, one for each expert.
        place: int32 [M], where in those each row is, -1 if it isn't.
        further: `Blocks` of the other rows. Rows of no expert are nowhere.
        number: How many of these have rows: an int32 scalar, or an integer outside of compiled
            functions.
    """

    first: Blocks
    place: Any
    further: Blocks
    number: Any


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
    size = at_least(1, at_most(num_rows, block_size(num_rows, num_experts)))

    def blocks(owner, nth):
        row = (starts[owner] + nth * size)[:, None] + index_range(size)
        return Blocks(jnp.where(row < ends[owner][:, None], row, -1), owner)

    index = index_range(num_rows)
    expert = run_of(ends, index)
    rank = index - gather(starts, expert)
    place = jnp.where((expert < num_experts) & (rank < size), expert * size + rank, -1)

    per_expert = jnp.maximum(rows_per_expert - 1, 0) // size
    last = jnp.cumsum(per_expert)
    per_turn = -(-((num_rows - 1) // size) // _TURNS)
    index = index_range(_TURNS * per_turn)
    owner = jnp.minimum(run_of(last, index), num_experts - 1)
    nth = index - (last - per_expert)[owner] + 1
    number = last[-1] if isinstance(last, jax.core.Tracer) else int(last[-1])
    first = blocks(index_range(num_experts), 0)
    return Places(first, place.astype(INDEX), blocks(owner, nth), number)


def block_size(num_rows, num_experts):
    """Places of a block, if there are so many rows."""
    mean = -(-num_rows // num_experts)
    return -(-(mean + at_least(_SPARE, mean // 8)) // _TILE) * _TILE


def apply(function, rows, rows_per_expert, banks):
    """Applies each expert's function to the rows of that expert.

    Args:
        function: Called with blocks of rows [B, S, D] and their parameters [B, ...] of each bank;
            it treats each row by itself. It must not close over a tensor.
        rows: Float tensor [M, D], sorted by expert.
        rows_per_expert: int32 [N]. Rows behind those belong to no expert.
        banks: List of tensors [N, ...], the experts' parameters.

    Returns:
        Float tensor [M, width]; zeros behind the last expert's rows.
    """
    # int8 has no gradient, and is multiplied as a float anyway.
    floats = [b if jnp.issubdtype(b.dtype, jnp.floating) else b.astype(rows.dtype) for b in banks]
    places = make_places(rows_per_expert, rows.shape[0])
    further, floats = _further(function, rows, floats, places)
    y = function(_moved(rows, places.first.row, places.place), *floats)
    return _moved(y, places.place, places.first.row) + further


def _moved(rows, index, inverse):
    def there(rows, index, inverse):
        return _taken(rows.reshape(-1, rows.shape[-1]), index)

    def back(upstream, rows, index, inverse):
        return [_taken(upstream.reshape(-1, rows.shape[-1]), inverse)]

    return with_gradient(there, back, [rows], [index, inverse])


def _further(function, rows, banks, places):
    """What the function makes of the rows in further blocks, and the banks as they are.

    The banks go through here so that their gradients do, and the loop adds to them in place.
    Gradients of their own, as large as the banks, would cost as much where nothing is to be added.

    Returns:
        Float tensor [M, width], zeros for all other rows; list of the banks.
    """

    def forward(rows, banks, places):
        def turn(blocks, y):
            return _with_rows(y, blocks, function(*_inputs(blocks, rows, banks)))

        result = jax.eval_shape(function, *_inputs(places.first, rows, banks))
        y = jnp.zeros((rows.shape[0], result.shape[-1]), result.dtype)
        return _in_turns(turn, places, y), banks

    def backward(upstream, rows, banks, places):
        return _gradients(function, upstream, rows, banks, places)

    return with_gradient(forward, backward, [rows, banks], [places])


def _gradients(function, upstream, rows, banks, places):
    """Those of `_further`, which can be differentiated as often as one likes."""

    def add(blocks, so_far, upstream, rows, banks):
        (of_rows, of_banks), inputs = so_far, _inputs(blocks, rows, banks)
        of_mine, *of_parameters = jax.vjp(function, *inputs)[1](_taken(upstream, blocks.row))
        sums = zip(of_banks, of_parameters, strict=True)
        of_banks = [of_bank.at[blocks.owner].add(of) for of_bank, of in sums]
        return _with_rows(of_rows, blocks, of_mine), of_banks

    def in_turns(upstream, rows, banks, places):
        of_y, of_banks = upstream
        turn = functools.partial(add, upstream=of_y, rows=rows, banks=banks)
        return _in_turns(turn, places, (jnp.zeros_like(rows), of_banks))

    def at_once(upstream, rows, banks, places):  # No way leads back through a loop.
        of_y, of_banks = upstream
        return add(places.further, (jnp.zeros_like(rows), of_banks), of_y, rows, banks)

    def gradient(upstream, *inputs):
        *inputs, places = inputs
        return jax.vjp(lambda *inputs: at_once(*inputs, places), *inputs)[1](upstream)

    return with_gradient(in_turns, gradient, [upstream, rows, banks], [places])


def _in_turns(turn, places, so_far):
    """Calls `turn` with some of the further blocks, and what the last turn returned."""
    per_turn = places.further.owner.shape[0] // _TURNS
    if per_turn == 0:
        return so_far

    def body(i, so_far):
        part = [jax.lax.dynamic_slice_in_dim(x, i * per_turn, per_turn) for x in places.further]
        return turn(Blocks(*part), so_far)

    turns = -(-places.number // per_turn)
    if not isinstance(turns, int):
        return jax.lax.fori_loop(0, turns, body, so_far)
    for i in range(turns):  # Eagerly JAX would compile a loop anew at each call.
        so_far = body(i, so_far)
    return so_far


def _inputs(blocks, rows, banks):
    """What the function gets: the rows in some blocks, and the parameters of each."""
    return [_taken(rows, blocks.row), *(gather(bank, blocks.owner) for bank in banks)]


def _taken(rows, index):
    """rows[index]; zeros for -1."""
    return jnp.where((index < 0)[..., None], jnp.zeros((), rows.dtype), gather(rows, index))


def _with_rows(rows, blocks, mine):
    """The rows, but those that are in some blocks as they are there."""
    index = jnp.where(blocks.row < 0, rows.shape[0], blocks.row)
    return rows.at[index].set(mine, mode="drop")
