"""What gatings compute of choices."""

import jax
import jax.numpy as jnp
from keras import ops

from keras_moe.backend.jax import collectives
from keras_moe.backend.jax.indices import INDEX


def top_k(x, k):
    """The K largest entries of each row.

    Args:
        x: Float tensor [T, N], without NaN and -inf.
        k: K.

    Returns:
        The entries in decreasing order, [T, K], and their indices, int32 [T, K]: equal ones in
        increasing order of index.
    """
    if x.shape[0] == 0:  # Of which JAX 0.6 has no gradient.
        return x[:, :k], jnp.zeros((0, k), INDEX)

    def largest(x):
        # Without barriers XLA merges later slices into it, and then sorts whole rows on CPUs. With
        # one for both, it fails where it takes this apart (jax 0.10).
        return tuple(map(jax.lax.optimization_barrier, jax.lax.top_k(x, k)))

    values, index = collectives.each_its_own(largest, x)
    return values, index.astype(INDEX)


def rank(scores, group=None):
    """The ranks of the examples in each column: 0 for the largest score, of equal ones the earlier.

    Args:
        scores: Float tensor [T, N], without NaN.
        group: int32 [T] or `None`; those of earlier groups come first.

    Returns:
        int32 [T, N].
    """
    # Ranks have no gradient, and JAX 0.6 fails at that of sorting nothing.
    order = jnp.argsort(-jax.lax.stop_gradient(scores), axis=0, stable=True)
    if group is not None:
        again = jnp.argsort(jnp.take(group, order, mode="clip"), axis=0, stable=True)
        order = jnp.take_along_axis(order, again, axis=0)
    # The rank of who is in a place: the inverse of the permutation.
    return jnp.argsort(order, axis=0).astype(INDEX)


def sum_by_expert(values, expert, num_experts):
    """The sum of the values of each expert, [N, ...].

    Args:
        values: Float tensor [..., *rest].
        expert: Integer tensor [...]; no expert where it is negative.
        num_experts: N.
    """
    values, expert = ops.convert_to_tensor(values), ops.convert_to_tensor(expert)
    expert = jnp.where(expert < 0, num_experts, expert)  # -1 would be the last one.
    sums = jnp.zeros((num_experts, *values.shape[expert.ndim :]), values.dtype)
    return sums.at[expert].add(values, mode="drop")
