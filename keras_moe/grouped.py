"""Products of sorted rows, each with the matrix of its expert: `product`, and what goes with it.

How many rows each expert has depends on the data. Three ways to live with that:

* Expert by expert: a loop over those that have rows multiplies just these. The others' matrices
  are not even read.
* Batched: each expert gets as many places as the fullest has rows, and one batched product computes
  all of them. Zeros fill the empty places.
* Block by block (`blocks.py`): only here the shapes don't depend on the data, as XLA and TPUs need
  it, at up to twice the operations.

Results and gradients of the rows are computed expert by expert, gradients of the matrices batched:
these are as large as all matrices, and a loop's would have to be put together by one more copy.
Only where the empty places would cost more than that copy is it a loop, too.

Measured with 2 cores, TensorFlow 2.21: benchmarks/README.md.
"""

import tensorflow as tf

from keras_moe.blocks import block_by_block
from keras_moe.dispatch import spread

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
        return block_by_block(tf.matmul, rows, rows_per_expert, [kernel])

    @tf.custom_gradient
    def multiply(rows, kernel):
        def times(piece, expert):
            return tf.matmul(piece, tf.cast(kernel[expert], rows.dtype))

        def times_transposed(piece, expert):
            # As a batch of one: the other product of TensorFlow (2.21, on CPUs) takes twice as long
            # with a transposed matrix and few rows.
            matrix = tf.cast(kernel[expert], rows.dtype)
            return tf.matmul(piece[None], matrix[None], transpose_b=True)[0]

        def gradient(upstream):
            return (
                _expert_by_expert(times_transposed, upstream, rows_per_expert, rows.shape[-1]),
                tf.cast(_gradient_of_kernel(rows, upstream, rows_per_expert), kernel.dtype),
            )

        return _expert_by_expert(times, rows, rows_per_expert, kernel.shape[-1]), gradient

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
        Boolean scalar: whether 1.2 times the largest number is at most the mean and 50.
    """
    rows = tf.cast(rows_per_expert, tf.float32)
    return _PLACE * tf.reduce_max(rows) <= tf.reduce_mean(rows) + _COPY


def of_rows(bank, rows_per_expert, num_rows):
    """The parameters of each sorted row's expert.

    Args:
        bank: Float tensor or variable [N, F].
        rows_per_expert: int32 [N].
        num_rows: M. Rows behind those of the experts get zeros.

    Returns:
        Float tensor [M, F].
    """
    num_experts = rows_per_expert.shape[0]
    rest = num_rows - tf.reduce_sum(rows_per_expert)
    expert = tf.repeat(tf.range(num_experts + 1), tf.concat([rows_per_expert, rest[None]], axis=0))
    return spread(tf.pad(bank, [[0, 1], [0, 0]]), expert)


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


def recomputed(function, forward=None):
    """Makes the backward pass of a function compute it again instead of storing what is inside.

    Args:
        function: Of float tensors or variables; its result is one float tensor.
        forward: Function that computes the same results another way, for the forward pass.

    Returns:
        A function with the same results and gradients, that keeps its arguments alone.
    """

    @tf.custom_gradient
    def call(first, *others):
        def gradient(upstream):
            with tf.GradientTape() as tape:
                arguments = [_after(upstream, first), *map(tf.identity, others)]
                tape.watch(arguments)
                again = function(*arguments)
            return tape.gradient(again, arguments, upstream)

        return (forward or function)(first, *others), gradient

    # Not variables: a custom gradient would have to answer for each that it reads.
    return lambda *arguments: call(*map(tf.convert_to_tensor, arguments))


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
    return tf.split(rows, sizes, num=sizes.shape[0])


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
    y = pieces.write(number, rest).concat()
    y.set_shape([rows.shape[0], width])
    return y


def _gradient_of_kernel(rows, upstream, rows_per_expert):
    """[N, D, F]: of each expert the sum of its rows' products with their gradients."""
    num_experts, most = rows_per_expert.shape[0], tf.reduce_max(rows_per_expert)
    ends = tf.cumsum(rows_per_expert)

    def batched():
        place = tf.range(most)
        filled = place < rows_per_expert[:, None]
        row = tf.where(filled, (ends - rows_per_expert)[:, None] + place, -1)
        # Zeros where there is no row -1: neither operand may have a NaN there.
        places = [
            tf.gather_nd(x, row[..., None], bad_indices_policy="IGNORE") for x in (rows, upstream)
        ]
        return tf.matmul(*places, transpose_a=True)

    def expert_by_expert():
        def of_expert(i):
            pieces = [_piece(x, i, rows_per_expert, ends) for x in (rows, upstream)]
            return tf.matmul(*pieces, transpose_a=True)

        shape = [rows.shape[-1], upstream.shape[-1]]
        return tf.map_fn(
            of_expert,
            tf.range(num_experts),
            parallel_iterations=10,  # as in any other graph; outside of one TensorFlow says 1
            fn_output_signature=tf.TensorSpec(shape, rows.dtype),
        )

    return tf.cond(is_even(rows_per_expert), batched, expert_by_expert)


def _piece(rows, expert, rows_per_expert, ends):
    return rows[ends[expert] - rows_per_expert[expert] : ends[expert]]


def _after(upstream, x):
    """`x`, in a graph not to be had before `upstream`.

    Otherwise the optimizer of the graph sees that the second computation equals the first, and
    keeps the first one's results. XLA ignores control dependencies, so the value has to depend.
    """
    if tf.executing_eagerly():
        return tf.identity(x)
    some = tf.reduce_max(tf.reshape(upstream, [-1])[:1])  # -inf where there is no element
    return x + tf.cast(tf.abs(some) < 0, x.dtype)  # False, also for NaN; compilers don't know that
