"""The way of CPUs to products of sorted rows: a loop over pieces of an expert's rows each.

A piece has a number of places that is known, and the number of pieces depends on the load. So
experts without rows cost nothing, and each of the others leaves places empty in its last piece.
"""

import jax
import jax.numpy as jnp

from keras_moe.backend.jax.indices import index_range, run_of

_PLACES = 8, 128  # the fewest and the most of a piece
_UNKNOWN = 64  # the places of a piece where a symbolic call doesn't know the number of rows


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
    y = _over_pieces(turn, [rows], rows_per_expert, size, y)[:number]
    behind = index_range(number) >= jnp.sum(rows_per_expert)
    return jnp.where(behind[:, None], jnp.zeros((), y.dtype), y)


def gradient_of_kernel(rows, upstream, rows_per_expert):
    """[N, D, F]: of each expert the sum of its rows' products with their gradients."""
    dtype = jnp.promote_types(rows.dtype, jnp.float32)  # of sums of several pieces

    def turn(expert, first, pieces, sums):
        product = jnp.matmul(pieces[0].T, pieces[1], preferred_element_type=dtype)
        before = jax.lax.dynamic_index_in_dim(sums, expert, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(sums, before + product, expert, 0)

    number = rows_per_expert.shape[0]
    sums = jnp.zeros((number, rows.shape[1], upstream.shape[1]), dtype)
    size = piece_size(rows.shape[0], number)
    return _over_pieces(turn, [rows, upstream], rows_per_expert, size, sums).astype(rows.dtype)


def _over_pieces(turn, tables, rows_per_expert, size, start):
    """Takes turns at pieces of `size` rows, each of one expert's, zeros behind them.

    Args:
        turn: Called with the expert, the number of the first row, the piece of each table, and what
            the last turn returned.
        tables: List of tensors [M, ...], sorted by expert.
        rows_per_expert: int32 [N].
        size: The places of a piece.
        start: What the first turn gets.
    """
    tables = [jnp.pad(table, [(0, size), (0, 0)]) for table in tables]
    ends, pieces = jnp.cumsum(rows_per_expert), -(-rows_per_expert // size)
    last = jnp.cumsum(pieces)

    def body(i, so_far):
        expert = run_of(last, i)
        first = ends[expert] - rows_per_expert[expert] + (i - last[expert] + pieces[expert]) * size
        own = (index_range(size) < ends[expert] - first)[:, None]
        mine = [jax.lax.dynamic_slice_in_dim(table, first, size) for table in tables]
        mine = [jnp.where(own, piece, jnp.zeros_like(piece)) for piece in mine]
        return turn(expert, first, mine, so_far)

    return jax.lax.fori_loop(0, last[-1], body, start)


def piece_size(num_rows, num_experts):
    """The power of two at the mean load or below, within limits.

    A smaller one would take more turns, a larger one leaves more places empty: less than a piece
    for each expert, so that all pieces together have less than twice the rows where the mean is
    within the limits.
    """
    if not isinstance(num_rows, int):
        return _UNKNOWN
    fewest, most = _PLACES
    return min(max(1 << max((num_rows // num_experts).bit_length() - 1, 0), fewest), most)
