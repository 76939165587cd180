"""A function of every expert's own rows: `apply` runs expert i's function on the rows of expert i.

Rows come sorted by expert, and how many each expert has depends on the data. Piece by piece every
expert computes just its own rows, but the shapes are those of the data. Block by block they are
not: the rows are cut into blocks of equal size, each of one expert, and all blocks are computed at
once. That is what XLA and TPUs need, at up to twice the operations.
"""

import tensorflow as tf

from keras_moe.dispatch import rearrange, take


def apply(function, rows, rows_per_expert, banks, static_shapes=False):
    """Applies each expert's function to the rows of that expert.

    Args:
        function: Called with rows and one array per bank: [rows of that expert, D] and [...], or
            blocks of rows [G, size, D] and [G, ...]. It treats each row by itself and returns
            rows of another width.
        rows: Float tensor [M, D], sorted by expert.
        rows_per_expert: int32 [N], their sum at most M.
        banks: List of tensors or variables [N, ...], the experts' parameters.
        static_shapes: Whether the shapes must not depend on `rows_per_expert`.

    Returns:
        Float tensor [M, width]; zeros behind the last expert's rows.
    """
    banks = [tf.convert_to_tensor(bank) for bank in banks]
    by = _block_by_block if static_shapes else _piece_by_piece
    return by(function, rows, rows_per_expert, banks)


def recomputed(function):
    """Makes the backward pass of a function compute it again instead of storing what is inside.

    Args:
        function: Of float tensors or variables; its result is one float tensor.

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

        return function(first, *others), gradient

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


def _piece_by_piece(function, rows, rows_per_expert, banks):
    *pieces, rest = split(rows, rows_per_expert)
    experts = zip(pieces, *[tf.unstack(bank) for bank in banks], strict=True)
    return join([function(*expert) for expert in experts], rest)


def _block_by_block(function, rows, rows_per_expert, banks):
    num_rows, num_experts = tf.shape(rows)[0], rows_per_expert.shape[0]
    # Blocks as large as the even share: at most N of them are not full, which doubles the rows.
    size = tf.maximum((num_rows + num_experts - 1) // num_experts, 1)
    # Each expert that has rows leaves at most size - 1 places empty.
    num_blocks = (num_rows + tf.minimum(num_experts, num_rows) * (size - 1)) // size

    last_row, last_block = (
        tf.cumsum(count) for count in (rows_per_expert, (rows_per_expert + size - 1) // size)
    )
    first_row, first_block = (tf.concat([[0], last], axis=0) for last in (last_row, last_block))

    expert = tf.searchsorted(last_block, tf.range(num_blocks), side="right")
    expert = tf.minimum(expert, num_experts - 1)  # Blocks that nobody needs.
    rank = (tf.range(num_blocks) - tf.gather(first_block, expert))[:, None] * size + tf.range(size)
    filled = tf.reshape(rank < tf.gather(rows_per_expert, expert)[:, None], [-1])
    source = tf.reshape(rank + tf.gather(first_row, expert)[:, None], [-1])

    expert_of_row = tf.searchsorted(last_row, tf.range(num_rows), side="right")
    place = tf.range(num_rows) - tf.gather(first_row, expert_of_row)
    place += tf.gather(first_block, expert_of_row) * size
    kept = expert_of_row < num_experts

    source, place = tf.where(filled, source, 0), tf.where(kept, place, 0)
    blocks = rearrange(rows, source, place, filled, kept)
    blocks = tf.reshape(blocks, [num_blocks, size, rows.shape[-1]])
    y = function(blocks, *[_parameters_of_blocks(bank, expert) for bank in banks])
    return rearrange(tf.reshape(y, [-1, y.shape[-1]]), place, source, kept, filled)


def _parameters_of_blocks(bank, expert):
    """bank[expert], whose gradient is a dense sum over each expert's blocks."""

    @tf.custom_gradient
    def gather(bank):
        def gradient(upstream):
            return tf.math.unsorted_segment_sum(upstream, expert, bank.shape[0])

        return take(bank, expert), gradient

    return gather(bank)


def _after(upstream, x):
    """`x`, in a graph not to be had before `upstream`.

    Otherwise the optimizer of the graph sees that the second computation equals the first, and
    keeps the first one's results. XLA ignores control dependencies, so the value has to depend.
    """
    if tf.executing_eagerly():
        return tf.identity(x)
    some = tf.reduce_max(tf.reshape(upstream, [-1])[:1])  # -inf where there is no element
    return x + tf.cast(tf.abs(some) < 0, x.dtype)  # False, also for NaN; compilers don't know that
