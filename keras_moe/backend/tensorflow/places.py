"""Rows of experts in batches: the way of GPUs, where a few large operations cost less than many.

The sorted rows are copied to blocks of S places. The first N blocks are one for each expert; an
expert with more rows than places gets further blocks behind those, each with a copy of its matrix.
So all products with a bank are one batched product, and a second one where there are further
blocks. Zeros fill the empty places.

S is what costs least by a count of rows: of all places, and of copying matrices. So an even load
goes into one batch with places for the fullest expert, and where one expert has most of the rows
the others are not computed as many times over.

Indices are int64: TensorFlow computes int32 arithmetic on the host, also where there is a GPU
(seen with TensorFlow 2.21). The host has to know two numbers alone, S and how many further
blocks there are.
"""

import functools
from typing import Any, NamedTuple

import tensorflow as tf

from keras_moe.backend.tensorflow.devices import captured
from keras_moe.backend.tensorflow.indices import index_range
from keras_moe.backend.tensorflow.indices import spread as copied

# What a further block costs beside its places, in rows. A card computes as much with a matrix and
# this many rows as it takes to copy the matrix, and to add up its gradient: some hundred operations
# in the time that a byte takes, and twice as many numbers as bytes or half as many.
_COPY = 256
# What all places cost more where there are further blocks, as rows are divided between the bank and
# the copied matrices, and put together again: an estimate by the bytes, not measured.
_DIVIDED = 1.5
# Places to choose from, in quarters of the mean. The largest number of rows is always among them.
_QUARTERS = (4, 5, 6, 8, 12, 16, 32)


class Places(NamedTuple):
    """Where the rows of N experts are: G ≥ N blocks of S places.

    Attributes:
        row: int64 [G, S], the row in each place, -1 in an empty one.
        place: int64 [M], the place of each row, -1 for a row of no expert.
        owner: int64 [G - N], whose the further blocks are.
    """

    row: Any
    place: Any
    owner: Any


def nowhere():
    """The `Places` that a way without any hands on."""
    return Places(tf.zeros([0, 0], tf.int64), tf.zeros([0], tf.int64), tf.zeros([0], tf.int64))


def make_places(rows_per_expert, num_rows):
    """Lays out the rows of N experts.

    Args:
        rows_per_expert: Integer tensor [N], N known.
        num_rows: M, an integer or int32 scalar. Rows behind those belong to no expert.

    Returns:
        `Places`.
    """
    num_experts = rows_per_expert.shape[0]
    counts = tf.cast(rows_per_expert, tf.int64)
    ends = tf.cumsum(counts)
    starts = ends - counts
    size, further = _choose_size(counts)
    last = tf.cumsum(further)
    first = last - further

    # All that the host has to wait for, in one copy. Without any row there are no places either.
    numbers = tf.cast(tf.stack([size, last[-1]]), tf.int32)
    num_places, num_further = tf.unstack(numbers)
    num_places = tf.minimum(num_places, num_rows)

    index = index_range(num_further)
    owner = tf.searchsorted(last, index, side="right", out_type=tf.int64)
    nth = tf.gather(1 - first, owner) + index
    begin = tf.concat([starts, tf.gather(starts, owner) + nth * size], axis=0)
    end = tf.concat([ends, tf.gather(ends, owner)], axis=0)
    row = begin[:, None] + index_range(num_places)
    row = tf.where(row < end[:, None], row, tf.constant(-1, tf.int64))

    index = index_range(num_rows)
    expert = tf.searchsorted(ends, index, side="right", out_type=tf.int64)
    nobodys = expert == num_experts
    expert = tf.minimum(expert, num_experts - 1)
    rank = index - tf.gather(starts, expert)
    nth = rank // size
    block = tf.where(nth > 0, num_experts - 1 + tf.gather(first, expert) + nth, expert)
    place = tf.where(nobodys, tf.constant(-1, tf.int64), block * size + rank % size)
    return Places(row, place, owner)


def _choose_size(counts):
    """S, the places of a block that cost least, and how many further blocks each expert needs."""
    num_experts = counts.shape[0]
    quarters = tf.constant(_QUARTERS, tf.int64)
    most = tf.reduce_max(counts)
    sizes = (tf.reduce_sum(counts) * quarters + (4 * num_experts - 1)) // (4 * num_experts)
    sizes = tf.concat([tf.minimum(sizes, most), most[None]], axis=0)
    sizes = tf.maximum(sizes, 1)[:, None]
    further = tf.maximum((counts + sizes - 1) // sizes - 1, 0)
    number = tf.reduce_sum(further, axis=1)
    # In float64, for which there is a kernel of `argmin` on GPUs, and which is exact.
    cost = tf.cast((num_experts + number) * sizes[:, 0], tf.float64)
    cost = tf.where(number > 0, _DIVIDED * cost, cost) + tf.cast(number * _COPY, tf.float64)
    best = tf.argmin(cost, output_type=tf.int64)
    return tf.gather(sizes[:, 0], best), tf.gather(further, best)


def arrange(rows, places):
    """Copies rows [M, D] to their places: [G·S, D], zeros in empty ones."""
    places = _of_any_size(places)
    return _moved(rows, *captured([tf.reshape(places.row, [-1]), places.place]))


def restore(rows, places):
    """Brings rows [G·S, D] back from their places: [M, D], zeros for those of no expert."""
    places = _of_any_size(places)
    return _moved(rows, *captured([places.place, tf.reshape(places.row, [-1])]))


def _moved(rows, index, inverse):
    @tf.custom_gradient
    def call(rows):
        # `gather_nd` has zeros for bad indices by itself, but copies number by number on a card.
        table = tf.concat([tf.zeros([1, rows.shape[-1]], rows.dtype), rows], axis=0)
        y = tf.gather(table, index + 1)
        return y, lambda upstream: _moved(tf.convert_to_tensor(upstream), inverse, index)

    return call(rows)


def multiply(rows, kernel, places, transposed=False, matmul=tf.matmul):
    """The product of rows in their places and the matrices of their experts.

    Args:
        rows: Float tensor [G·S, D].
        kernel: Tensor [N, D, F] of the same dtype.
        places: `Places`.
        transposed: Whether to take the transposed matrices instead, [N, F, D].
        matmul: What to call in place of `tf.matmul`, unless transposed.

    Returns:
        Float tensor [G·S, F].
    """
    places = _of_any_size(places)
    num_experts = kernel.shape[0]
    blocks = _blocks(rows, places)
    product = functools.partial(tf.matmul, transpose_b=True) if transposed else matmul

    def further():
        others = copied(kernel, places.owner)
        parts = [(blocks[:num_experts], kernel), (blocks[num_experts:], others)]
        return tf.concat([product(*part) for part in parts], axis=0)

    def even():
        return product(blocks, kernel)

    y = tf.cond(_has_further(places), further, even)
    return tf.reshape(y, [-1, kernel.shape[-2 if transposed else -1]])


def gradient_of_kernel(rows, upstream, places, num_experts):
    """[N, D, F]: of each expert the sum of its rows' products with their gradients."""
    places = _of_any_size(places)
    blocks = [_blocks(x, places) for x in (rows, upstream)]

    def further():
        first = tf.matmul(*[x[:num_experts] for x in blocks], transpose_a=True)
        others = tf.matmul(*[x[num_experts:] for x in blocks], transpose_a=True)
        return first + tf.math.unsorted_segment_sum(others, places.owner, num_experts)

    def even():
        return tf.matmul(*blocks, transpose_a=True)

    return tf.cond(_has_further(places), further, even)


def spread(table, places):
    """The rows of a table [N, F] in each place: [G·S, F]."""
    places = _of_any_size(places)
    each = tf.concat([table, copied(table, places.owner)], axis=0)
    shape = tf.concat([tf.shape(places.row), [table.shape[-1]]], axis=0)
    return tf.reshape(tf.broadcast_to(each[:, None], shape), [-1, table.shape[-1]])


def gather_up(upstream, places, num_experts):
    """The gradient of `spread`, [N, F]: the sum over all places of each expert."""
    places = _of_any_size(places)
    sums = tf.reduce_sum(_blocks(upstream, places), axis=1)
    others = tf.math.unsorted_segment_sum(sums[num_experts:], places.owner, num_experts)
    return sums[:num_experts] + others


def _of_any_size(places):
    """The same `Places`, in a graph without known shapes where they were made outside of it.

    There a CPU has left them empty, which says nothing of what the graph is made for.
    """
    if tf.executing_eagerly():
        return places
    return Places(*(x if tf.is_symbolic_tensor(x) else _of_any_shape(x) for x in places))


def _of_any_shape(x):
    return tf.raw_ops.PlaceholderWithDefault(input=x, shape=[None] * len(x.shape))


def _blocks(rows, places):
    shape = tf.concat([tf.shape(places.row), [rows.shape[-1]]], axis=0)
    return tf.reshape(rows, shape)


def _has_further(places):
    return tf.size(places.owner) > 0
