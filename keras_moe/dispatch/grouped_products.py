"""Products of sorted rows, each with the matrix of its expert: `product`, and what goes with it.

How many rows each expert has depends on the data. Three ways to live with that:

* Expert by expert: a loop over those that have rows multiplies just these. The others' matrices
  are not even read.
* Batched: each expert gets as many places as the fullest has rows, and one batched product computes
  all of them. Zeros fill the empty places.
* Block by block (`blocks.py`): only here the shapes don't depend on the data, as XLA and TPUs need
  it, at up to twice the operations.

On CPUs results and gradients of the rows are computed expert by expert. Gradients of the matrices
are batched, as those of a loop would have to be put together by one more copy, as large as all
matrices. On GPUs, where it takes longer to start a small product than to compute it, all is
batched. Wherever the load is so uneven that empty places would cost more than the loop, it is a
loop after all.
"""

import functools

import tensorflow as tf

from keras_moe.dispatch import onednn, spread
from keras_moe.dispatch.blocks import block_by_block
from keras_moe.vectorization import batched_product, refuse_vectorising, turn_by_turn

# By these the batch is weighed against the loop, measured with 2 cores, in the time that one row of
# an expert takes.
_PLACE = 1.2  # a place of the batch: to copy a row there, and to compute it
_COPY = 50.0  # to copy an expert's gradient


def product(rows, kernel, rows_per_expert, static_shapes=False):
    """Multiplies each row by the matrix of its expert.

    Args:
        rows: Float tensor [M, D], sorted by expert.
        kernel: Tensor or variable [N, D, F]. One of another dtype than `rows`, for storage, is
            converted expert by expert.
        rows_per_expert: int32 [N]. Rows behind those belong to no expert.
        static_shapes: Whether the shapes must not depend on `rows_per_expert`.

    Returns:
        Float tensor [M, F]; zeros behind the last expert's rows.
    """
    kernel = tf.convert_to_tensor(kernel)
    if static_shapes:
        return block_by_block(batched_product, rows, rows_per_expert, [kernel])

    @tf.custom_gradient
    def multiply(rows, kernel):
        def gradient(upstream):
            of_kernel = None
            if kernel.dtype.is_floating:  # And not int8.
                of_kernel = _gradient_of_kernel(rows, upstream, rows_per_expert)
                of_kernel = tf.cast(of_kernel, kernel.dtype)
            # Not before `rows`, which may be recomputed: both at a time would take more memory.
            with tf.control_dependencies([rows]):
                of_rows = _times(upstream, kernel, rows_per_expert, transposed=True)
            return of_rows, of_kernel

        return _times(rows, kernel, rows_per_expert), gradient

    return multiply(rows, kernel)


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

    return turn_by_turn(loop, rows, rows_per_expert, *banks)


def loops_are_cheap():
    """Whether small operations are worth starting one by one: not on GPUs."""
    return not tf.config.list_logical_devices("GPU")


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


def of_rows(bank, rows_per_expert, num_rows):
    """The parameters of each sorted row's expert.

    Args:
        bank: Float tensor or variable [N, F].
        rows_per_expert: int32 [N].
        num_rows: M. Rows behind those of the experts get zeros.

    Returns:
        Float tensor [M, F].
    """
    table = tf.pad(bank, [[0, 1], [0, 0]])  # Row N is for rows of no expert.
    return spread(table, turn_by_turn(_expert_of_row, rows_per_expert, num_rows))


def one_example(function, x, experts, banks):
    """Applies several experts' functions to one example: nothing is sorted, padded or copied.

    Args:
        function: Called with `x` and an expert's parameters [...] of each bank.
        x: Float tensor [1, D].
        experts: int32 [K], K known.
        banks: List of tensors or variables [N, ...], the experts' parameters.

    Returns:
        Float tensor [K, width].
    """

    @tf.custom_gradient
    def call(x, *banks):
        parameters = [[bank[i] for bank in banks] for i in tf.unstack(experts)]

        def results(x, parameters):
            return tf.concat([function(x, *expert) for expert in parameters], axis=0)

        def gradient(upstream):
            with tf.GradientTape() as tape:
                tape.watch([x, parameters])
                y = results(x, parameters)
            of_x, of_experts = tape.gradient(
                y, [x, parameters], upstream, unconnected_gradients="zero"
            )
            of_banks = [
                tf.tensor_scatter_nd_add(tf.zeros_like(bank), experts[:, None], tf.stack(theirs))
                for bank, theirs in zip(banks, zip(*of_experts, strict=True), strict=True)
            ]
            return of_x, *of_banks

        return results(x, parameters), gradient

    return call(x, *map(tf.convert_to_tensor, banks))


def row_times(row, kernel):
    """The product of a row [1, D] and a matrix [D, F], from which it may differ in dtype.

    `MatMul` of a single row takes up to twice as long as this (TensorFlow 2.21, on CPUs), which,
    with nothing marked as sparse, is Eigen's plain product.
    """
    kernel = tf.cast(kernel, row.dtype)
    if row.dtype == tf.float32 and loops_are_cheap():
        return tf.raw_ops.SparseMatMul(a=row, b=kernel)
    return tf.matmul(row, kernel)


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


def _times(rows, kernel, rows_per_expert, transposed=False):
    """Each row times its expert's matrix, or the transposed one; zeros behind the last expert's."""
    function = functools.partial(_times_in_graph, transposed=transposed)
    return turn_by_turn(function, rows, kernel, rows_per_expert)


def _times_in_graph(rows, kernel, rows_per_expert, transposed):
    def batched():
        places = _in_places(rows, rows_per_expert)
        y = tf.matmul(places, tf.cast(kernel, rows.dtype), transpose_b=transposed)
        return _from_places(y, rows_per_expert, tf.shape(rows)[0])

    def expert_by_expert():
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

    if loops_are_cheap():
        return expert_by_expert()
    return tf.cond(is_even(rows_per_expert), batched, expert_by_expert)


def _gradient_of_kernel(rows, upstream, rows_per_expert):
    """[N, D, F]: of each expert the sum of its rows' products with their gradients."""
    return turn_by_turn(_gradient_of_kernel_in_graph, rows, upstream, rows_per_expert)


def _gradient_of_kernel_in_graph(rows, upstream, rows_per_expert):
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
    return tf.gather_nd(rows, row[..., None], bad_indices_policy="IGNORE")


def _from_places(places, rows_per_expert, num_rows):
    """Undoes `_in_places`; zeros behind the last expert's rows."""
    expert = _expert_of_row(rows_per_expert, num_rows)
    ends = tf.cumsum(tf.pad(rows_per_expert, [[1, 1]]))  # 0 first, and once more for the rest
    rank = tf.range(num_rows) - tf.gather(ends, expert)
    expert = tf.where(expert < rows_per_expert.shape[0], expert, -1)
    place = tf.stack([expert, rank], axis=1)
    return tf.gather_nd(places, place, bad_indices_policy="IGNORE")


def _expert_of_row(rows_per_expert, num_rows):
    """int32 [M]; N for the rows behind those of the experts."""
    rest = num_rows - tf.reduce_sum(rows_per_expert)
    numbers = tf.concat([rows_per_expert, rest[None]], axis=0)
    return tf.repeat(tf.range(rows_per_expert.shape[0] + 1), numbers)
