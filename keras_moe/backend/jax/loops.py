"""The way of CPUs to products of sorted rows: a loop over pieces of an expert's rows each.

A piece has a number of places that is known, and the number of pieces depends on the load. So
experts without rows cost nothing, and each of the others leaves places empty in its last piece.

Eagerly JAX would compile a loop anew at each call, so both products are compiled as a whole.
"""

import functools

import jax
import jax.numpy as jnp

from keras_moe.backend.jax.indices import gather, index_range, run_of

_PLACES = 8, 128  # of a piece: a multiple of the first, at most the second
_UNKNOWN = 64  # the places of a piece where a symbolic call doesn't know the number of rows


@functools.partial(jax.jit, static_argnames=("precision", "transposed"))
def times(rows, kernel, rows_per_expert, precision=None, transposed=False):
    """Each row times its expert's matrix, or the transposed one; zeros behind the last expert's."""

    def turn(expert, first, pieces, y):
        matrix = jax.lax.dynamic_index_in_dim(kernel, expert, keepdims=False).astype(rows.dtype)
        matrix = matrix.T if transposed else matrix
        product = jnp.matmul(pieces[0], matrix, precision=precision)
        # Rows behind the expert's are overwritten by the next piece.
        return jax.lax.dynamic_update_slice_in_dim(y, product, first, 0)

    number, width = rows.shape[0], kernel.shape[1 if transposed else 2]
    size = piece_size(number, kernel.shape[0])  # room for what the last piece has too much
    y = jnp.zeros((number + size, width), rows.dtype)
    y = _over_pieces(turn, _with_room([rows], size), rows_per_expert, size, y)[:number]
    behind = index_range(number) >= jnp.sum(rows_per_expert)
    return jnp.where(behind[:, None], jnp.zeros((), y.dtype), y)


@jax.jit
def gradient_of_kernel(rows, upstream, rows_per_expert):
    """[N, D, F]: of each expert the sum of its rows' products with their gradients."""
    dtype = jnp.promote_types(rows.dtype, jnp.float32)  # of sums of several pieces

    def turn(expert, first, pieces, sums):
        before = jax.lax.dynamic_index_in_dim(sums, expert, keepdims=False)
        product = jnp.matmul(pieces[0].T, pieces[1], preferred_element_type=dtype)
        return jax.lax.dynamic_update_index_in_dim(sums, before + product, expert, 0)

    size = piece_size(rows.shape[0], rows_per_expert.shape[0])
    tables = _with_room([rows, upstream], size)
    # Most experts have one piece. All at once their products go straight to where they belong.
    sums = jnp.einsum(
        "ncd,ncf->ndf", *_first_pieces(tables, rows_per_expert, size), preferred_element_type=dtype
    )
    sums = _over_pieces(turn, tables, rows_per_expert, size, sums, skipped=1)
    return sums.astype(rows.dtype)


def _first_pieces(tables, rows_per_expert, size):
    """[N, size, ...] of each table with room: every expert's first rows, zeros behind them."""
    nth = index_range(size)
    own = nth < rows_per_expert[:, None]
    first = (jnp.cumsum(rows_per_expert) - rows_per_expert)[:, None]
    index = jnp.where(own, first + nth, tables[0].shape[0] - 1)  # The last row of the room: zeros.
    return [gather(table, index) for table in tables]


def _with_room(tables, size):
    """Tables with so many zeros behind them that a piece may begin at every row."""
    return [jnp.pad(table, [(0, size), (0, 0)]) for table in tables]


def _piece(tables, first, end, size):
    """`size` rows of each table, zeros in place of those that aren't before `end`."""
    own = (index_range(size) < end - first)[:, None]
    pieces = [jax.lax.dynamic_slice_in_dim(table, first, size) for table in tables]
    return [jnp.where(own, piece, jnp.zeros_like(piece)) for piece in pieces]


def _over_pieces(turn, tables, rows_per_expert, size, start, skipped=0):
    """Takes turns at pieces of `size` rows, each of one expert's, zeros behind them.

    Args:
        turn: Called with the expert, the number of the first row, the piece of each table, and what
            the last turn returned.
        tables: List of tensors [M + size, ...], sorted by expert.
        rows_per_expert: int32 [N].
        size: The places of a piece.
        start: What the first turn gets.
        skipped: How many of each expert's pieces to leave out.
    """
    ends, pieces = jnp.cumsum(rows_per_expert), -(-rows_per_expert // size)
    last = jnp.cumsum(jnp.maximum(pieces - skipped, 0))

    def body(i, so_far):
        expert = run_of(last, i)
        nth = i - last[expert] + pieces[expert]
        first = ends[expert] - rows_per_expert[expert] + nth * size
        return turn(expert, first, _piece(tables, first, ends[expert], size), so_far)

    return jax.lax.fori_loop(0, last[-1], body, start)


def piece_size(num_rows, num_experts):
    """How many rows a piece has: so many that most experts have enough in as few as can be.

    A smaller one would take more turns, a larger one leaves more places empty. All pieces of an
    expert have room for 1.2 times the mean load, where that is within the limits. So less than 1.2
    times the rows are left empty, and all pieces together have less than 2.2 times the rows,
    whatever the load.
    """
    if not isinstance(num_rows, int):
        return _UNKNOWN
    fewest, most = _PLACES
    room = 6 * num_rows // (5 * num_experts)
    return max(room // max(-(-room // most), 1) // fewest * fewest, fewest)
