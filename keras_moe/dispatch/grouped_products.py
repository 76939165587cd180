"""Products of sorted rows, each with the matrix of its expert: `product`, and what goes with it.

How many rows each expert has depends on the data. Four ways to live with that:

* Expert by expert: a loop over those that have rows multiplies just these. The others' matrices
  are not even read.
* Batched: each expert gets as many places as the fullest has rows, and one batched product computes
  all of them. Zeros fill the empty places.
* In places (`places.py`): the same, but what an expert has beyond the places that are worth it goes
  to further blocks.
* Block by block (`blocks.py`): only here the shapes don't depend on the data, as XLA and TPUs need
  it, at up to twice the operations.

On CPUs results and gradients of the rows are computed expert by expert. Gradients of the matrices
are batched, as those of a loop would have to be put together by one more copy, as large as all
matrices, unless the load is so uneven that empty places would cost more than that. On GPUs, where
it takes longer to start a small product than to compute it, rows are in places from the first
product of a bank to the last one.
"""

from typing import Any, NamedTuple

import tensorflow as tf

from keras_moe.dispatch import exact, onednn, places
from keras_moe.dispatch.blocks import block_by_block
from keras_moe.dispatch.devices import by_device, densified
from keras_moe.dispatch.vectorization import matmul_each, refuse_vectorising

# By these the batch is weighed against the loop, measured with 2 cores, in the time that one row of
# an expert takes.
_PLACE = 1.2  # a place of the batch: to copy a row there, and to compute it
_COPY = 50.0  # to copy an expert's gradient


class Layout(NamedTuple):
    """How sorted rows lie while they are multiplied: as they are, or on GPUs in places.

    Attributes:
        rows_per_expert: int32 [N]. Rows behind those belong to no expert.
        num_rows: M.
        places: `Places`, on GPUs.
    """

    rows_per_expert: Any
    num_rows: Any
    places: places.Places


def lay_out(rows_per_expert, num_rows):
    """The `Layout` of M rows, sorted by expert, for all products with them."""
    return Layout(
        rows_per_expert,
        num_rows,
        by_device(places.nowhere, lambda: places.make_places(rows_per_expert, num_rows)),
    )


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
    return _products(rows, [kernel], rows_per_expert, static_shapes, matmul_each, tf.matmul)[0]


def exact_products(rows, kernels, rows_per_expert, static_shapes=False):
    """The same with each of several kernels, in float32 and exact on GPUs too: a list."""
    matmuls = exact.matmul, exact.by_parts
    return _products(rows, kernels, rows_per_expert, static_shapes, *matmuls)


def _products(rows, kernels, rows_per_expert, static_shapes, matmul, matmul_in_places):
    if static_shapes:
        kernels = [tf.convert_to_tensor(kernel) for kernel in kernels]
        return [block_by_block(matmul, rows, rows_per_expert, [kernel]) for kernel in kernels]
    num_rows = tf.shape(rows)[0] if rows.shape[0] is None else rows.shape[0]
    layout = lay_out(rows_per_expert, num_rows)
    rows = arrange(rows, layout)
    return [restore(multiply(rows, kernel, layout, matmul_in_places), layout) for kernel in kernels]


def arrange(rows, layout):
    """Brings sorted rows [M, D] into a `Layout`, [R, D]."""

    @tf.custom_gradient
    def call(rows):
        return _to_places(rows, layout), lambda upstream: _from_places(upstream, layout)

    return call(rows)


def restore(rows, layout):
    """Undoes `arrange`; zeros for rows of no expert, if they have become something else."""

    @tf.custom_gradient
    def call(rows):
        return _from_places(rows, layout), lambda upstream: _to_places(upstream, layout)

    return call(rows)


def multiply(rows, kernel, layout, matmul_in_places=tf.matmul):
    """Multiplies each row by the matrix of its expert.

    Args:
        rows: Float tensor [R, D], as `arrange` has laid them out.
        kernel: Tensor or variable [N, D, F], maybe of another dtype, from which it is converted.
        layout: Their `Layout`.
        matmul_in_places: What to call for the result where rows are in places; the gradients are
            plain products.

    Returns:
        Float tensor [R, F]; zeros in rows of no expert.
    """

    @tf.custom_gradient
    def call(rows, kernel):
        has_gradient = kernel.dtype.is_floating  # And is not int8.

        def in_loops(upstream):
            of_kernel = []
            if has_gradient:
                of_kernel = [_gradient_of_kernel(rows, upstream, layout.rows_per_expert)]
            # Not before `rows`, which may be recomputed: both at a time would take more memory.
            with tf.control_dependencies([tf.identity(rows)]):
                of_rows = _times(upstream, kernel, layout.rows_per_expert, transposed=True)
            return [of_rows, *of_kernel]

        def in_places(upstream):
            matrices, size = tf.cast(kernel, rows.dtype), kernel.shape[0]
            of_rows = places.multiply(upstream, matrices, layout.places, transposed=True)
            if not has_gradient:
                return [of_rows]
            return [of_rows, places.gradient_of_kernel(rows, upstream, layout.places, size)]

        def gradient(upstream):
            of_rows, *of_kernel = by_device(lambda: in_loops(upstream), lambda: in_places(upstream))
            return of_rows, tf.cast(of_kernel[0], kernel.dtype) if of_kernel else None

        def multiplied():
            matrices = tf.cast(kernel, rows.dtype)
            return places.multiply(rows, matrices, layout.places, matmul=matmul_in_places)

        y = by_device(lambda: _times(rows, kernel, layout.rows_per_expert), multiplied)
        return y, gradient

    return call(rows, tf.convert_to_tensor(kernel))


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
    return _expert_by_expert(
        lambda piece, expert: function(piece, *(bank[expert] for bank in banks)),
        rows,
        rows_per_expert,
        width,
    )


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


def of_rows(bank, layout):
    """The parameters of each row's expert.

    Args:
        bank: Float tensor or variable [N, F].
        layout: The `Layout` of the rows.

    Returns:
        Float tensor [R, F]; zeros for rows of no expert.
    """

    @tf.custom_gradient
    def call(bank):
        def sums(upstream):
            expert = _expert_of_row(layout.rows_per_expert, layout.num_rows)
            return tf.math.unsorted_segment_sum(upstream, expert, bank.shape[0] + 1)[:-1]

        def gradient(upstream):
            return by_device(
                lambda: sums(upstream),
                lambda: places.gather_up(upstream, layout.places, bank.shape[0]),
            )

        def taken():
            table = tf.pad(bank, [[0, 1], [0, 0]])  # Row N is for rows of no expert.
            return tf.gather(table, _expert_of_row(layout.rows_per_expert, layout.num_rows))

        return by_device(taken, lambda: places.spread(bank, layout.places)), gradient

    return call(tf.convert_to_tensor(bank))


def one_example(function, x, experts, banks):
    """Applies several experts' functions to one example: nothing is sorted, padded or copied.

    On GPUs the parameters are copied, and all experts computed at once.

    Args:
        function: Called with `x` [1, D] and an expert's parameters [...] of each bank, or with
            [1, 1, D] and those of all K experts [K, ...].
        x: Float tensor [1, D].
        experts: Integer tensor [K], K known.
        banks: List of tensors or variables [N, ...], the experts' parameters.

    Returns:
        Float tensor [K, width].
    """

    @tf.custom_gradient
    def call(x, *banks):
        def one_by_one():
            return [[bank[i] for bank in banks] for i in tf.unstack(experts)]

        def all_at_once():
            return [[tf.gather(bank, experts) for bank in banks]]

        def results(x, parameters, stacked=False):
            y = [function(x[None] if stacked else x, *expert) for expert in parameters]
            return y[0][:, 0] if stacked else tf.concat(y, axis=0)

        def gradients(upstream, parameters, stacked=False):
            with tf.GradientTape() as tape:
                tape.watch([x, parameters])
                y = results(x, parameters, stacked)
            of_x, of_experts = tape.gradient(
                y, [x, parameters], upstream, unconnected_gradients="zero"
            )
            of_experts = of_experts[0] if stacked else map(tf.stack, zip(*of_experts, strict=True))
            of_banks = [
                tf.tensor_scatter_nd_add(tf.zeros_like(bank), experts[:, None], theirs)
                for bank, theirs in zip(banks, of_experts, strict=True)
            ]
            return of_x, *of_banks

        def gradient(upstream):
            return by_device(
                lambda: gradients(upstream, one_by_one()),
                lambda: gradients(upstream, all_at_once(), stacked=True),
            )

        y = by_device(
            lambda: results(x, one_by_one()),
            lambda: results(x, all_at_once(), stacked=True),
        )
        return y, gradient

    return call(x, *map(tf.convert_to_tensor, banks))


def row_times(row, kernel):
    """The product of a row [1, D] and a matrix [D, F], from which it may differ in dtype.

    `MatMul` of a single row takes up to twice as long as this (TensorFlow 2.21, on CPUs), which,
    with nothing marked as sparse, is Eigen's plain product.
    """
    kernel = tf.cast(kernel, row.dtype)
    if row.dtype != tf.float32:
        return tf.matmul(row, kernel)
    return by_device(
        lambda: tf.raw_ops.SparseMatMul(a=row, b=kernel), lambda: tf.matmul(row, kernel)
    )


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


def _to_places(rows, layout):
    return by_device(lambda: rows, lambda: places.arrange(rows, layout.places))


def _from_places(rows, layout):
    rows = by_device(lambda: rows, lambda: places.restore(rows, layout.places))
    rows.set_shape([tf.get_static_value(layout.num_rows), rows.shape[-1]])
    return rows


def _times(rows, kernel, rows_per_expert, transposed=False):
    """Each row times its expert's matrix, or the transposed one; zeros behind the last expert's."""

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


def _gradient_of_kernel(rows, upstream, rows_per_expert):
    """[N, D, F]: of each expert the sum of its rows' products with their gradients."""
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


def _expert_of_row(rows_per_expert, num_rows):
    """int32 [M]; N for the rows behind those of the experts."""
    rest = num_rows - tf.reduce_sum(rows_per_expert)
    numbers = tf.concat([rows_per_expert, rest[None]], axis=0)
    return tf.repeat(tf.range(rows_per_expert.shape[0] + 1), numbers)
