"""Squares of large matrices, which are nowhere kept."""

import jax
import jax.numpy as jnp


def means(matrices):
    """The mean of the squares of each row and of each column.

    Args:
        matrices: Float tensor [..., D, F].

    Returns:
        Tensors [..., D] and [..., F].
    """
    # One pass for each: of squares that both use XLA would write down all. The barrier hides that.
    again = jax.lax.optimization_barrier(matrices)
    return jnp.mean(jnp.square(matrices), axis=-1), jnp.mean(jnp.square(again), axis=-2)
