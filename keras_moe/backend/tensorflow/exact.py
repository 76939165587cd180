"""Products in float32 that are as exact on a GPU as on a CPU: those by which a gating chooses.

On GPUs TensorFlow multiplies float32 by TF32, of which a number has 11 significant bits. That is
enough for what is learned, and not for what is compared: an example would go to other experts than
on a CPU. So each factor is split into two numbers of 11 and 12 bits and three products are added
up; what is left out is as small as the rounding of float32. XLA, which on TPUs would even take
bfloat16, is told to be exact.
"""

import tensorflow as tf

from keras_moe.backend.tensorflow import xla
from keras_moe.backend.tensorflow.devices import by_device, captured
from keras_moe.backend.tensorflow.vectorization import matmul_each


def matmul(x, kernel):
    """x·kernel, exact to the rounding of float32; the gradients are plain products.

    Args:
        x: float32 tensor [T, D] or [G, T, D].
        kernel: float32 tensor or variable [D, N] or [G, D, N].

    Returns:
        float32 tensor [T, N] or [G, T, N].
    """

    @tf.custom_gradient
    def call(x, kernel):
        x, kernel = captured([x, kernel])

        def gradient(upstream):
            of_x = matmul_each(upstream, kernel, transpose_b=True)
            return of_x, matmul_each(x, upstream, transpose_a=True)

        if xla.compiling():
            return xla.exact_dot(x, kernel), gradient
        return by_device(lambda: matmul_each(x, kernel), lambda: by_parts(x, kernel)), gradient

    return call(tf.convert_to_tensor(x), tf.convert_to_tensor(kernel))


def by_parts(x, kernel):
    """The same product as a sum of products of which each is exact in TF32."""
    if x.dtype != tf.float32:
        return tf.matmul(x, kernel)
    (x_high, x_low), (high, low) = _parts(x), _parts(kernel)
    # Only the product of the higher parts has what is not finite: infinity times 0 would be NaN.
    small = tf.matmul(_finite(x_high), low) + tf.matmul(x_low, _finite(high))
    return small + tf.matmul(x_high, high)


def _parts(x):
    high = _high(x)
    return high, _finite(x - high)


def _finite(x):
    return tf.where(tf.math.is_finite(x), x, 0.0)


@tf.custom_gradient
def _high(x):
    """`x` rounded to 11 significant bits, of the 24 of float32."""
    bits = tf.bitcast(x, tf.uint32)  # For integers with a sign a GPU has no sum.
    half, mask = (tf.constant(bits, tf.uint32) for bits in (0x1000, 0xFFFFE000))
    rounded = tf.bitcast(tf.bitwise.bitwise_and(bits + half, mask), tf.float32)
    return tf.where(tf.math.is_nan(x), x, rounded), lambda upstream: upstream
