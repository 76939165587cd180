"""Functions of every expert's own rows in static shapes, as XLA and TPUs need them: block by block.

The sorted rows are cut into blocks of S places. Each block is of one expert, with a copy of that
expert's parameters, and all blocks are computed at once. So the load decides whose each block is,
but not how many there are.

M rows of N experts make blocks as large as the even share, S = ceil(M / N). An expert leaves places
empty in its last block alone, S - 1 at most, so that (M + N·(S - 1)) / S blocks, rounded down, are
enough for every load. As N·(S - 1) ≤ M, that is at most twice the rows.
"""

import tensorflow as tf

from keras_moe.dispatch.rows import rearrange, spread
from keras_moe.dispatch.sorting import index_range


def block_by_block(function, rows, rows_per_expert, banks):
    """Applies each expert's function to the rows of that expert, in shapes that are static.

    Args:
        function: Called once, with the rows of all blocks [G, S, D] and their parameters [G, ...]
            from each bank. It treats each row by itself, and returns rows of another width.
        rows: Float tensor [M, D], sorted by expert.
        rows_per_expert: int32 [N]. Rows behind those belong to no expert.
        banks: List of tensors [N, ...], the experts' parameters.

    Returns:
        Float tensor [M, width]; zeros behind the last expert's rows.
    """
    num_rows = tf.shape(rows)[0] if rows.shape[0] is None else rows.shape[0]
    num_experts, counts = rows_per_expert.shape[0], tf.cast(rows_per_expert, tf.int64)
    if num_experts == 1:  # A single block.
        kept = (index_range(num_rows) < counts)[:, None]
        rows = tf.where(kept, rows, tf.zeros([], rows.dtype))
        y = function(rows[None], *banks)[0]
        return tf.where(kept, y, tf.zeros([], y.dtype))
    smaller, larger = (min, max) if isinstance(num_rows, int) else (tf.minimum, tf.maximum)
    # Blocks as large as the even share: at most N of them are not full, which doubles the rows.
    size = larger((num_rows + num_experts - 1) // num_experts, 1)
    # Each expert that has rows leaves at most size - 1 places empty.
    num_blocks = (num_rows + smaller(num_experts, num_rows) * (size - 1)) // size

    places = tf.cast(size, tf.int64)
    last_row, last_block = (tf.cumsum(count) for count in (counts, (counts + places - 1) // places))
    none = tf.zeros([1], tf.int64)
    first_row, first_block = (tf.concat([none, last], axis=0) for last in (last_row, last_block))

    block = index_range(num_blocks)
    expert = tf.searchsorted(last_block, block, side="right", out_type=tf.int64)
    expert = tf.minimum(expert, num_experts - 1)  # Blocks that nobody needs.
    rank = (block - tf.gather(first_block, expert))[:, None] * places + index_range(size)
    filled = tf.reshape(rank < tf.gather(counts, expert)[:, None], [-1])
    source = tf.reshape(rank + tf.gather(first_row, expert)[:, None], [-1])

    row = index_range(num_rows)
    expert_of_row = tf.searchsorted(last_row, row, side="right", out_type=tf.int64)
    place = row - tf.gather(first_row, expert_of_row)
    place += tf.gather(first_block, expert_of_row) * places
    kept = expert_of_row < num_experts

    nothing = tf.zeros([], tf.int64)
    source, place = tf.where(filled, source, nothing), tf.where(kept, place, nothing)
    blocks = rearrange(rows, source, place, filled, kept)
    blocks = tf.reshape(blocks, [num_blocks, size, rows.shape[-1]])
    y = function(blocks, *[spread(bank, expert) for bank in banks])
    return rearrange(tf.reshape(y, [-1, y.shape[-1]]), place, source, kept, filled)
