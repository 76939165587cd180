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

from keras_moe.dispatch import exact, loops, places
from keras_moe.dispatch.blocks import block_by_block
from keras_moe.dispatch.devices import by_device, is_for_cpu
from keras_moe.dispatch.vectorization import matmul_each


class Layout(NamedTuple):
    """How sorted rows lie while they are multiplied: as they are, or on GPUs in places.

    Attributes:
        rows_per_expert: int32 [N]. Rows behind those belong to no expert.
        num_rows: M.
        places: `Places`, on GPUs; `None` where the rows were laid out for a CPU alone.
    """

    rows_per_expert: Any
    num_rows: Any
    places: places.Places


def lay_out(rows_per_expert, num_rows):
    """The `Layout` of M rows, sorted by expert, for all products with them."""
    if is_for_cpu():
        return Layout(rows_per_expert, num_rows, None)
    places_of_gpu = by_device(places.nowhere, lambda: places.make_places(rows_per_expert, num_rows))
    return Layout(rows_per_expert, num_rows, places_of_gpu)


def by_layout(layout, cpu, gpu):
    """`by_device`, as long as the rows are laid out for either."""
    return cpu() if layout.places is None else by_device(cpu, gpu)


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
                of_kernel = [loops.gradient_of_kernel(rows, upstream, layout.rows_per_expert)]
            # Not before `rows`, which may be recomputed: both at a time would take more memory.
            with tf.control_dependencies([tf.identity(rows)]):
                of_rows = loops.times(upstream, kernel, layout.rows_per_expert, transposed=True)
            return [of_rows, *of_kernel]

        def in_places(upstream):
            matrices, size = tf.cast(kernel, rows.dtype), kernel.shape[0]
            of_rows = places.multiply(upstream, matrices, layout.places, transposed=True)
            if not has_gradient:
                return [of_rows]
            return [of_rows, places.gradient_of_kernel(rows, upstream, layout.places, size)]

        def gradient(upstream):
            of_rows, *of_kernel = by_layout(
                layout, lambda: in_loops(upstream), lambda: in_places(upstream)
            )
            return of_rows, tf.cast(of_kernel[0], kernel.dtype) if of_kernel else None

        def multiplied():
            matrices = tf.cast(kernel, rows.dtype)
            return places.multiply(rows, matrices, layout.places, matmul=matmul_in_places)

        y = by_layout(layout, lambda: loops.times(rows, kernel, layout.rows_per_expert), multiplied)
        return y, gradient

    return call(rows, tf.convert_to_tensor(kernel))


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
            expert = loops.expert_of_row(layout.rows_per_expert, layout.num_rows)
            return tf.math.unsorted_segment_sum(upstream, expert, bank.shape[0] + 1)[:-1]

        def gradient(upstream):
            return by_layout(
                layout,
                lambda: sums(upstream),
                lambda: places.gather_up(upstream, layout.places, bank.shape[0]),
            )

        def taken():
            table = tf.pad(bank, [[0, 1], [0, 0]])  # Row N is for rows of no expert.
            return tf.gather(table, loops.expert_of_row(layout.rows_per_expert, layout.num_rows))

        return by_layout(layout, taken, lambda: places.spread(bank, layout.places)), gradient

    return call(tf.convert_to_tensor(bank))


def _to_places(rows, layout):
    return by_layout(layout, lambda: rows, lambda: places.arrange(rows, layout.places))


def _from_places(rows, layout):
    rows = by_layout(layout, lambda: rows, lambda: places.restore(rows, layout.places))
    rows.set_shape([tf.get_static_value(layout.num_rows), rows.shape[-1]])
    return rows
