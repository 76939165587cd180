"""Indices, and gathers by them, in int32: JAX has no int64 unless all of it is told so."""

import jax
import jax.numpy as jnp
import numpy as np
from keras import ops

INDEX = "int32"  # of numbers of examples, rows and experts that are computed with

_FEW = 64  # runs

tensor = ops.convert_to_tensor


def gather(x, index):
    """x[index] along the first axis; zeros where there is nothing to take."""
    if x.shape[0] == 0:
        return jnp.zeros((*index.shape, *x.shape[1:]), x.dtype)
    # Else a negative index would be counted from the end, and one too large would give NaN.
    return jnp.take(x, index, axis=0, mode="clip")


def ensure_shape(x, shape):
    """The tensor: here its shape is known."""
    return x


def index_range(number):
    """0, 1, … as int32 [number]."""
    return jnp.arange(number, dtype=INDEX)


def at_least(least, size):
    """The larger of two sizes, of which a symbolic call knows the second one by a name."""
    return max(least, size) if isinstance(size, int) else jax.core.max_dim(least, size)


def at_most(most, size):
    """The smaller of two sizes."""
    return min(most, size) if isinstance(size, int) else jax.core.min_dim(most, size)


def largest(sizes):
    """The largest of some sizes, as a size of at least 1; `None` while it is not yet known."""
    if any(isinstance(size, jax.core.Tracer) for size in jax.tree.leaves(sizes)):
        return None
    return int(np.max(sizes, initial=1))


def run_of(ends, place):
    """Of consecutive runs the one that each place is in; their number where it is in none.

    Args:
        ends: int32 [R], the place behind each run.
        place: int32 [M].

    Returns:
        int32 [M].
    """
    # A few comparisons cost less than a loop.
    method = "compare_all" if ends.shape[0] <= _FEW or place.ndim == 0 else "scan"
    return jnp.searchsorted(ends, place, side="right", method=method).astype(INDEX)


def placed(values, place, size, empty):
    """A vector with each value in its place, and `empty` in all others.

    Args:
        values: int32 [M].
        place: int32 [M], of no other value unless it is the last one.
        size: The number of places.
        empty: Integer.

    Returns:
        int32 [size].
    """
    return jnp.full(size, empty, INDEX).at[place].set(values, mode="drop")


def spread(table, index):
    """table[index] along the first axis. Each row's gradient is a sum."""
    return gather(tensor(table), index)
