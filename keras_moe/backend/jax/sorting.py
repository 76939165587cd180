"""Sorting by expert."""

import jax.numpy as jnp

from keras_moe.backend.jax.indices import index_range


def sort(expert, num_experts):
    """Sorts entries by expert, equal ones in the order in which they are.

    Args:
        expert: int32 [M], from 0 to N - 1.
        num_experts: N.

    Returns:
        Which entry comes at each row, int32 [M]; the row of each entry, int32 [M]; the entries of
        each expert, int32 [N].
    """
    order = jnp.argsort(expert, stable=True).astype(expert.dtype)
    row = jnp.zeros_like(order).at[order].set(index_range(expert.shape[0]), unique_indices=True)
    counts = jnp.zeros(num_experts, expert.dtype).at[expert].add(1)
    return order, row, counts
