"""A single example and its experts: nothing is sorted."""

import jax.numpy as jnp
from keras import ops

from keras_moe.backend.jax.indices import gather


def of_each(function, x, experts, banks):
    """Applies several experts' functions to one example: nothing is sorted or padded.

    Args:
        function: Called with [1, 1, D] and the parameters of all K experts [K, ...] of each bank.
        x: Float tensor [1, D].
        experts: Integer tensor [K], K known.
        banks: List of tensors or variables [N, ...], the experts' parameters.

    Returns:
        Float tensor [K, width].
    """
    return function(x[None], *(gather(bank, experts) for bank in banks))[:, 0]


def row_times(row, kernel):
    """The product of a row and a matrix, from which it may differ in dtype."""
    return jnp.matmul(row, ops.cast(kernel, row.dtype))
