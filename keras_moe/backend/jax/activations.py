"""Activations whose gradient needs no more than their result."""

import jax
import jax.numpy as jnp
import keras


@jax.custom_jvp
def _relu(x):
    return jnp.maximum(x, 0)


# JAX's own asks for the sign of x. So XLA keeps x for the backward pass, and computes the result,
# which the next product's gradient needs, a second time.
@_relu.defjvp
def _tangent(inputs, tangents):
    result = _relu(*inputs)
    (tangent,) = tangents
    return result, jax.lax.select(result > 0, tangent, jnp.zeros_like(result))


def lean(activation):
    """The same function, with such a gradient where there is one."""
    return _relu if activation is keras.activations.relu else activation
