"""Functions of every expert's own rows in static shapes, as XLA and TPUs need them: block by block.

The sorted rows are cut into blocks of S places. Each block is of one expert, with a copy of that
expert's parameters, and all blocks are computed at once. So the load decides whose each block is,
but not how many there are.

M rows of N experts make blocks as large as the even share, S = ceil(M / N). An expert leaves places
empty in its last block alone, S - 1 at most, so that (M + N·(S - 1)) / S blocks, rounded down, are
enough for every load. As N·(S - 1) ≤ M, that is at most twice the rows.
"""

from keras import ops

from keras_moe.backend import indices
from keras_moe.dispatch.rows import rearrange


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
    num_rows, num_experts = ops.shape(rows)[0], rows_per_expert.shape[0]
    counts = ops.cast(rows_per_expert, indices.INDEX)
    if num_experts == 1:  # A single block.
        kept = (indices.index_range(num_rows) < counts)[:, None]
        rows = ops.where(kept, rows, ops.zeros((), rows.dtype))
        y = function(rows[None], *banks)[0]
        return ops.where(kept, y, ops.zeros((), y.dtype))
    # Blocks as large as the even share: at most N of them are not full, which doubles the rows.
    size = indices.at_least(1, (num_rows + num_experts - 1) // num_experts)
    # Each expert that has rows leaves at most size - 1 places empty.
    num_blocks = (num_rows + indices.at_most(num_experts, num_rows) * (size - 1)) // size

    places = ops.cast(size, indices.INDEX)
    blocks_per_expert = (counts + places - 1) // places
    last_row, last_block = (ops.cumsum(count, axis=0) for count in (counts, blocks_per_expert))
    none = ops.zeros((1,), indices.INDEX)
    first_row, first_block = (ops.concatenate([none, last]) for last in (last_row, last_block))

    expert = indices.run_of(last_block, indices.index_range(num_blocks))
    # There may be blocks that nobody needs.
    expert = ops.minimum(expert, ops.cast(num_experts - 1, indices.INDEX))
    rank = (indices.index_range(num_blocks) - indices.gather(first_block, expert))[:, None] * places
    rank += indices.index_range(size)
    filled = ops.reshape(rank < indices.gather(counts, expert)[:, None], (-1,))
    source = ops.reshape(rank + indices.gather(first_row, expert)[:, None], (-1,))

    row = indices.index_range(num_rows)
    expert_of_row = indices.run_of(last_row, row)
    place = row - indices.gather(first_row, expert_of_row)
    place += indices.gather(first_block, expert_of_row) * places
    kept = expert_of_row < num_experts

    nothing = ops.zeros((), indices.INDEX)
    source, place = ops.where(filled, source, nothing), ops.where(kept, place, nothing)
    blocks = rearrange(rows, source, place, filled, kept)
    blocks = ops.reshape(blocks, (num_blocks, size, rows.shape[-1]))
    y = function(blocks, *[indices.spread(bank, expert) for bank in banks])
    return rearrange(ops.reshape(y, (-1, y.shape[-1])), place, source, kept, filled)
