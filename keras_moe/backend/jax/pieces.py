"""Sorted rows cut into one piece for each expert, and put together again.

No shape may depend on the data. So each piece has as many places as there are rows, an expert's own
rows in the first of them and zeros behind: experts that are layers compute N times the rows.
"""

import jax
import jax.numpy as jnp

from keras_moe.backend.jax.indices import index_range


def split(rows, rows_per_expert):
    """Cuts sorted rows into one piece per expert.

    Args:
        rows: Tensor [M, D], sorted by expert.
        rows_per_expert: int32 [N], their sum at most M.

    Returns:
        A list of N tensors [M, D], then what `join` asks for.
    """
    number = rows.shape[0]
    ends = jnp.cumsum(rows_per_expert)
    padded = jnp.concatenate([rows, jnp.zeros_like(rows)])
    pieces = []
    for i in range(rows_per_expert.shape[0]):
        first = ends[i] - rows_per_expert[i]
        piece = jax.lax.dynamic_slice_in_dim(padded, first, number)
        own = (index_range(number) < rows_per_expert[i])[:, None]
        pieces.append(jnp.where(own, piece, jnp.zeros_like(piece)))
    return [*pieces, rows_per_expert]


def join(pieces, rest):
    """Undoes `split`; what no expert has seen becomes zeros.

    Args:
        pieces: A list of N tensors [M, D], of which the rows behind an expert's own are left out.
        rest: What `split` returned last.

    Returns:
        Tensor [M, D].
    """
    number, starts = pieces[0].shape[0], jnp.cumsum(rest) - rest
    y = jnp.zeros((2 * number, pieces[0].shape[1]), pieces[0].dtype)
    for i, piece in enumerate(pieces):  # The next one overwrites what is behind an expert's rows.
        y = jax.lax.dynamic_update_slice_in_dim(y, piece, starts[i], 0)
    mine = (index_range(number) < jnp.sum(rest))[:, None]
    return jnp.where(mine, y[:number], 0)
