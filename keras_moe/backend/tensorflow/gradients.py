"""Functions with gradients of their own."""

import tensorflow as tf


def with_gradient(function, gradient, inputs, others=()):
    """Calls a function that has a gradient of its own.

    Neither function may close over a tensor: the gradient may be computed where those are gone.

    Args:
        function: Of `inputs` and `others`; it returns one tensor.
        gradient: Of the upstream gradient, `inputs` and `others`; it returns a list with a gradient
            for each of the inputs.
        inputs: List of float tensors.
        others: List of structures of tensors, and what else is known; they have no gradient.

    Returns:
        The function's result.
    """

    @tf.custom_gradient
    def call(*inputs):
        return function(*inputs, *others), lambda upstream: gradient(upstream, *inputs, *others)

    return call(*inputs)
