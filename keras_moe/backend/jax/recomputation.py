"""Memory for time: functions that the backward pass computes again (appendix D of the paper)."""

import jax
from keras import ops


def recomputed(function, forward=None):
    """Makes the backward pass of a function compute it again instead of storing what is inside.

    Args:
        function: Of tensors or variables; its result is one float tensor.
        forward: Without effect: there is no faster way that leads nowhere back.

    Returns:
        A function with the same results and gradients, that keeps its arguments alone.
    """
    again = jax.checkpoint(function)
    return lambda *arguments: again(*map(ops.convert_to_tensor, arguments))
