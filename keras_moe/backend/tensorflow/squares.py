"""Squares of large matrices."""

import tensorflow as tf


def means(matrices):
    """The mean of the squares of each row and of each column.

    Args:
        matrices: Float tensor [..., D, F].

    Returns:
        Tensors [..., D] and [..., F].
    """
    squares = tf.square(matrices)
    *batch, rows, columns = matrices.shape
    # As products with ones: TensorFlow multiplies matrices faster than it reduces them.
    over_columns = tf.matmul(squares, tf.ones((*batch, columns, 1), squares.dtype))[..., 0]
    over_rows = tf.matmul(tf.ones((*batch, 1, rows), squares.dtype), squares)[..., 0, :]
    return over_columns / columns, over_rows / rows
