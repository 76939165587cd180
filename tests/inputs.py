"""What layers are given: dtypes that a backend has, numbers that they hold, sparse tensors."""

import keras
import numpy as np


def policies(*names):
    """Those of dtype policies that there are: JAX has float64 only if all of it is told so."""
    return [name for name in names if name != "float64" or keras.config.backend() != "jax"]


def rounded(x, dtype):
    """The numbers nearest to those of a float32 array that a dtype holds, in float32."""
    return np.float32(x).astype(dtype).astype("float32")


def sparse(x):
    """An array as a sparse tensor."""
    if keras.config.backend() == "jax":
        from jax.experimental.sparse import BCOO

        return BCOO.fromdense(x)
    import tensorflow as tf

    return tf.sparse.from_dense(x)
