"""Functions with gradients of their own."""

import jax

_TENSOR = object()


def with_gradient(function, gradient, inputs, others=()):
    """Calls a function that has a gradient of its own.

    Neither function may close over a tensor: JAX computes the gradient where those are gone.

    Args:
        function: Of `inputs` and `others`; it returns one tensor.
        gradient: Of the upstream gradient, `inputs` and `others`; it returns a list with a gradient
            for each of the inputs.
        inputs: List of float tensors.
        others: List of structures of tensors, and what else is known; they have no gradient.

    Returns:
        The function's result.
    """
    leaves, structure = jax.tree.flatten(list(others))
    # Only tensors may go through JAX: a number that is known would be one no longer.
    tensors = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]

    known = [_TENSOR if isinstance(leaf, jax.Array) else leaf for leaf in leaves]

    def put_together(tensors):
        tensors = iter(tensors)
        found = [next(tensors) if leaf is _TENSOR else leaf for leaf in known]
        return jax.tree.unflatten(structure, found)

    @jax.custom_vjp
    def call(inputs, tensors):
        return function(*inputs, *put_together(tensors))

    def forward(inputs, tensors):
        return call(inputs, tensors), (inputs, tensors)

    def backward(saved, upstream):
        inputs, tensors = saved
        gradients = gradient(upstream, *inputs, *put_together(tensors))
        return list(gradients), None

    call.defvjp(forward, backward)
    return call(list(inputs), tensors)
