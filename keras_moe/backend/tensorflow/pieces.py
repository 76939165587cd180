"""Sorted rows cut into one piece for each expert, and put together again."""

import tensorflow as tf

from keras_moe.backend.tensorflow.vectorization import refuse_vectorising


def split(rows, rows_per_expert):
    """Cuts sorted rows into one piece per expert.

    Args:
        rows: Tensor [M, D], sorted by expert.
        rows_per_expert: int32 [N], their sum at most M.

    Returns:
        A list of N tensors [rows of that expert, D], then the rest, which belongs to no expert.
    """
    rest = tf.shape(rows)[0] - tf.reduce_sum(rows_per_expert)
    sizes = tf.concat([rows_per_expert, rest[None]], axis=0)
    pieces = tf.split(rows, sizes, num=sizes.shape[0])
    refuse_vectorising(pieces[0], "experts that are layers, of which each gets its own rows alone")
    return pieces


def join(pieces, rest):
    """Undoes `split`; the rest, which no expert has seen, becomes zeros.

    Args:
        pieces: A list of N tensors [rows of that expert, D].
        rest: Tensor [R, any], the last piece that `split` returned.

    Returns:
        Tensor [M, D].
    """
    width = pieces[0].shape[-1]
    zeros = tf.zeros([tf.shape(rest)[0], width], pieces[0].dtype)
    return tf.concat([*pieces, zeros], axis=0)
