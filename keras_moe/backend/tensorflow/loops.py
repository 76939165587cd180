"""The way of CPUs to products of sorted rows: a loop over the experts that have rows."""

import functools

import tensorflow as tf

from keras_moe.backend.tensorflow import onednn
from keras_moe.backend.tensorflow.devices import densified
from keras_moe.backend.tensorflow.vectorization import as_one_operation

# By these the batch is weighed against the loop, measured with 2 cores, in the time that one row of
# an expert takes.
_PLACE = 1.2  # a place of the batch: to copy a row there, and to compute it
_COPY = 50.0  # to copy an expert's gradient


def apply(function, rows, rows_per_expert, banks, width):
    """Applies each expert's function to its rows, in a single loop.

    Where there is no backward pass, this saves what `product` puts together for it.

    Args:
        function: Called with the rows of an expert [rows, D] and its parameters [...] of each bank.
        rows: Float tensor [M, D], sorted by expert.
        rows_per_expert: int32 [N]. Rows behind those belong to no expert.
        banks: List of tensors [N, ...], the experts' parameters.
        width: Of the function's result.

    Returns:
        Float tensor [M, width]; zeros behind the last expert's rows.
    """

    def loop(rows, rows_per_expert, *banks):
        return _expert_by_expert(
            lambda piece, expert: function(piece, *(bank[expert] for bank in banks)),
            rows,
            rows_per_expert,
            width,
        )

    return as_one_operation(loop, rows, rows_per_expert, *banks)


def is_even(rows_per_expert):
    """Whether a batch with places for the largest number of rows is estimated to be faster.

    Args:
        rows_per_expert: int32 [N].

    Returns:
        Boolean scalar: whether there are rows, and 1.2 times the largest number is at most 50 more
        than the mean.
    """
    rows = tf.cast(rows_per_expert, tf.float32)
    most = tf.reduce_max(rows)
    return tf.logical_and(most > 0, _PLACE * most <= tf.reduce_mean(rows) + _COPY)


def times(rows, kernel, rows_per_expert, transposed=False):
    """Each row times its expert's matrix, or the transposed one; zeros behind the last expert's."""
    function = functools.partial(_times, transposed=transposed)
    return as_one_operation(function, rows, kernel, rows_per_expert)


def _times(rows, kernel, rows_per_expert, transposed):
    def of_expert(piece, expert):
        matrix = tf.cast(kernel[expert], rows.dtype)
        if not transposed:
            return tf.matmul(piece, matrix)
        # With few rows `tf.matmul(piece, matrix, transpose_b=True)` takes 2 to 5 times as long
        # as these (TensorFlow 2.21, on CPUs).
        if onednn.is_in_use():
            return tf.matmul(piece[None], matrix[None], transpose_b=True)[0]
        return tf.transpose(tf.matmul(matrix, piece, transpose_b=True))

    width = kernel.shape[-2 if transposed else -1]
    return _expert_by_expert(of_expert, rows, rows_per_expert, width)


def gradient_of_kernel(rows, upstream, rows_per_expert):
    """[N, D, F]: of each expert the sum of its rows' products with their gradients."""
    return as_one_operation(_gradient_of_kernel, rows, upstream, rows_per_expert)


def _gradient_of_kernel(rows, upstream, rows_per_expert):
    ends = tf.cumsum(rows_per_expert)

    def batched():
        places = [_in_places(x, rows_per_expert) for x in (rows, upstream)]
        return tf.matmul(*places, transpose_a=True)

    def expert_by_expert():
        def of_expert(i):
            pieces = [_piece(x, i, rows_per_expert, ends) for x in (rows, upstream)]
            return tf.matmul(*pieces, transpose_a=True)

        shape = [rows.shape[-1], upstream.shape[-1]]
        return tf.map_fn(
            of_expert,
            tf.range(rows_per_expert.shape[0]),
            fn_output_signature=tf.TensorSpec(shape, rows.dtype),
        )

    return tf.cond(is_even(rows_per_expert), batched, expert_by_expert)


def _expert_by_expert(function, rows, rows_per_expert, width):
    """function(rows of an expert, its index) of each that has rows; zeros behind their rows."""
    experts = tf.cast(tf.where(rows_per_expert > 0)[:, 0], tf.int32)
    number, ends = tf.size(experts), tf.cumsum(rows_per_expert)

    def turn(i, pieces):
        piece = _piece(rows, experts[i], rows_per_expert, ends)
        return i + 1, pieces.write(i, function(piece, experts[i]))

    pieces = tf.TensorArray(rows.dtype, number + 1, element_shape=[None, width], infer_shape=False)
    _, pieces = tf.while_loop(lambda i, _: i < number, turn, (0, pieces))
    rest = tf.zeros([tf.shape(rows)[0] - ends[-1], width], rows.dtype)
    y = _concatenated(pieces.write(number, rest))
    y.set_shape([rows.shape[0], width])
    return y


def _concatenated(pieces):
    if tf.executing_eagerly():
        return pieces.concat()
    # As `pieces.concat()`, but where a loop with this operation is vectorised all the same, in an
    # export, it is refused. The newer one takes all pieces for equally long.
    return tf.raw_ops.TensorListConcat(
        input_handle=pieces.flow, element_dtype=pieces.dtype, element_shape=pieces.element_shape
    ).tensor


def _piece(rows, expert, rows_per_expert, ends):
    return rows[ends[expert] - rows_per_expert[expert] : ends[expert]]


def _in_places(rows, rows_per_expert):
    """[N, C, D], with a place for each row of the fullest expert; zeros in empty places."""
    place = tf.range(tf.reduce_max(rows_per_expert))
    first = tf.cumsum(rows_per_expert, exclusive=True)
    row = tf.where(place < rows_per_expert[:, None], first[:, None] + place, -1)
    return tf.gather_nd(densified(rows), row[..., None], bad_indices_policy="IGNORE")


def expert_of_row(rows_per_expert, num_rows):
    """int32 [M]; N for the rows behind those of the experts."""
    return as_one_operation(_expert_of_row, rows_per_expert, num_rows)


def _expert_of_row(rows_per_expert, num_rows):
    rest = num_rows - tf.reduce_sum(rows_per_expert)
    numbers = tf.concat([rows_per_expert, rest[None]], axis=0)
    return tf.repeat(tf.range(rows_per_expert.shape[0] + 1), numbers)
