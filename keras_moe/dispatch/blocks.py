"""Functions of every expert's own rows in static shapes, as XLA and TPUs need them: block by block.

The sorted rows are cut into blocks of S places. Each block is of one expert, with a copy of that
expert's parameters, and all blocks are computed at once. So the load decides whose each block is,
but not how many there are.

M rows of N experts make blocks as large as the even share, S = ceil(M / N). An expert leaves places
empty in its last block alone, S - 1 at most, so that (M + N·(S - 1)) / S blocks, rounded down, are
enough for every load. As N·(S - 1) ≤ M, that is at most twice the rows.
"""

import tensorflow as tf

from keras_moe.dispatch import rearrange, spread


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
    num_rows, num_experts = tf.shape(rows)[0], rows_per_expert.shape[0]
    if num_experts == 1:  # A single block.
        kept = (tf.range(num_rows) < rows_per_expert)[:, None]
        rows = tf.where(kept, rows, tf.zeros([], rows.dtype))
        y = function(rows[None], *banks)[0]
        return tf.where(kept, y, tf.zeros([], y.dtype))
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
    y = function(blocks, *[spread(bank, expert) for bank in banks])
    return rearrange(tf.reshape(y, [-1, y.shape[-1]]), place, source, kept, filled)
