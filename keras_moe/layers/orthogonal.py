"""Orthogonal initial values in any precision."""

import keras
from keras import ops


@keras.saving.register_keras_serializable("keras_moe")
class Orthogonal(keras.initializers.Orthogonal):
    """`keras.initializers.Orthogonal`, computed in float32 where a variable is narrower.

    TensorFlow has no QR decomposition in bfloat16.
    """

    def __call__(self, shape, dtype=None):
        dtype = keras.config.floatx() if dtype is None else dtype
        computed = super().__call__(shape, keras.backend.result_type(dtype, "float32"))
        return ops.cast(computed, dtype)
