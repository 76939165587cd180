"""The way of TPUs to products of sorted rows: kernels that multiply an expert's own tiles of rows.

They are JAX's own, megablox. `jax.lax.ragged_dot_general` is no choice: libtpu (0.0.52) makes a
kernel of it for some chips alone (v4 as one core, v5p), and for a v5e and a v6e a dense product of
all rows with the matrices of all experts, forward and in both gradients.
"""

import importlib

import jax
import jax.numpy as jnp

from keras_moe.backend.jax.indices import index_range

# The package has a function of the same name in the module's place.
MEGABLOX = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")

_ROWS = 16, 256  # the fewest and the most of a tile: 16 is what bfloat16 fills a register with
_COLUMNS = 512  # Two tiles of each factor and of the result have room in a chip's memory.


def can_multiply(rows):
    """Whether there are kernels: for two dtypes, and a number of rows that is known."""
    return rows.dtype in (jnp.bfloat16, jnp.float32) and isinstance(rows.shape[0], int)


def times(rows, kernel, rows_per_expert, exactly=False, transposed=False):
    """Each row times its expert's matrix, or the transposed one; zeros behind the last expert's.

    Args:
        rows: [M, D], in a dtype that `can_multiply`.
        kernel: [N, D, F], or transposed [N, F, D].
        rows_per_expert: int32 [N].
        exactly: Whether a product in float32 is to be as exact as that; not of a transposed kernel.
        transposed: Whether the matrices are to be transposed.
    """
    dtype, kernel = rows.dtype, kernel.astype(rows.dtype)
    if exactly and dtype == jnp.float32:
        rows, kernel = _in_thirds(rows, kernel)

    @jax.custom_batching.sequential_vmap  # A grid that depends on the data has no batches.
    def product(rows, kernel, rows_per_expert):
        padded, size = _in_tiles(rows, rows_per_expert)
        width = kernel.shape[1 if transposed else 2]
        return MEGABLOX.gmm(
            padded,
            kernel,
            rows_per_expert,
            dtype,
            (size, _columns(rows.shape[1]), _columns(width)),
            transpose_rhs=transposed,
        )[: rows.shape[0]]

    y = product(rows, kernel, rows_per_expert)
    # No kernel has written there.
    behind = index_range(rows.shape[0]) >= jnp.sum(rows_per_expert)
    return jnp.where(behind[:, None], jnp.zeros((), y.dtype), y)


def gradient_of_kernel(rows, upstream, rows_per_expert):
    """[N, D, F]: of each expert the sum of its rows' products with their gradients."""

    @jax.custom_batching.sequential_vmap
    def sums(rows, upstream, rows_per_expert):
        padded, size = _in_tiles(rows, rows_per_expert)
        others, _ = _in_tiles(upstream, rows_per_expert)
        tiling = size, _columns(rows.shape[1]), _columns(upstream.shape[1])
        return MEGABLOX.tgmm(padded.T, others, rows_per_expert, rows.dtype, tiling)

    return sums(rows, upstream, rows_per_expert)


def tile_size(num_rows, num_experts):
    """The rows of a tile: a power of two at the mean load or below, within limits.

    A tile is multiplied by the matrix of each expert that has rows in it. That is once, and once
    more for each expert that begins in the middle of one: all tiles together have less than twice
    the rows where the mean is within the limits.
    """
    fewest, most = _ROWS
    return min(max(1 << max((num_rows // num_experts).bit_length() - 1, 0), fewest), most)


def _in_thirds(rows, kernel):
    """Two factors in bfloat16, six times as deep, whose product is that of two in float32.

    A number is the sum of three in bfloat16. Of the nine products three are too small to count:
    XLA's highest precision leaves out the same ones.
    """

    def thirds(x):
        parts = []
        for _ in range(3):
            # XLA would take a conversion to bfloat16 and back for none at all.
            parts.append(jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))
            x = x - parts[-1]
        return [part.astype(jnp.bfloat16) for part in parts]

    high, middle, low = thirds(rows)
    rows = jnp.concatenate([high, high, high, middle, middle, low], axis=1)
    high, middle, low = thirds(kernel)
    return rows, jnp.concatenate([high, middle, low, high, middle, high], axis=1)


def _in_tiles(rows, rows_per_expert):
    """Rows with so many zeros behind them that tiles divide them, and the size of a tile."""
    size = tile_size(rows.shape[0], rows_per_expert.shape[0])
    return jnp.pad(rows, [(0, -rows.shape[0] % size), (0, 0)]), size


def _columns(width):
    return min(width, _COLUMNS)
