"""Products in float32 that are exact on every device: those by which a gating chooses.

GPUs multiply float32 by TF32 and TPUs by bfloat16 unless told otherwise. That is enough for what is
learned, and not for what is compared: an example would go to other experts than on a CPU.
"""

import jax
import jax.numpy as jnp

from keras_moe.backend.jax.gradients import with_gradient
from keras_moe.backend.jax.indices import tensor


def matmul(x, kernel):
    """x·kernel, exact to the rounding of float32; the gradients are plain products.

    Args:
        x: float32 tensor [T, D] or [G, T, D].
        kernel: float32 tensor or variable [D, N] or [G, D, N].

    Returns:
        float32 tensor [T, N] or [G, T, N].
    """

    def product(x, kernel):
        return jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST)

    def gradient(upstream, x, kernel):
        return [upstream @ jnp.swapaxes(kernel, -1, -2), jnp.swapaxes(x, -1, -2) @ upstream]

    return with_gradient(product, gradient, [tensor(x), tensor(kernel)])
