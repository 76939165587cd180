"""Products of sorted rows, each with the matrix of its expert.

How many rows each expert has depends on the data. Four ways to live with that:

* Expert by expert: a loop over those that have rows multiplies just these. The others' matrices
  are not even read.
* Batched: each expert gets as many places as the fullest has rows, and one batched product computes
  all of them. Zeros fill the empty places.
* In places (`places.py`): the same, but what an expert has beyond the places that are worth it goes
  to further blocks.
* Block by block (`dispatch/blocks.py`): only here the shapes don't depend on the data, as XLA and
  TPUs need it, at up to twice the operations.

On CPUs results and gradients of the rows are computed expert by expert. Gradients of the matrices
are batched, as those of a loop would have to be put together by one more copy, as large as all
matrices, unless the load is so uneven that empty places would cost more than that. On GPUs, where
it takes longer to start a small product than to compute it, rows are in places from the first
product of a bank to the last one.
"""

import functools
from typing import Any, NamedTuple

import tensorflow as tf

from keras_moe.backend.tensorflow import exact, loops, places
from keras_moe.backend.tensorflow.devices import by_device, captured, is_for_cpu
from keras_moe.backend.tensorflow.recomputation import recomputed


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


def apply(function, rows, rows_per_expert, banks, width, *, training, recompute):
    """Applies each expert's function to the rows of that expert, by the fastest way there is.

    Args:
        function: Called with rows and parameters, those of all experts on all rows if it gets their
            `layout`, or else with an expert's on its rows [rows, D].
        rows: Float tensor [M, D], sorted by expert.
        rows_per_expert: int32 [N]. Rows behind those belong to no expert.
        banks: List of tensors [N, ...], the experts' parameters.
        width: Of the function's result.
        training: Whether there will be a backward pass.
        recompute: Whether that computes again what is inside.

    Returns:
        Float tensor [M, width]; zeros behind the last expert's rows.
    """
    layout = lay_out(rows_per_expert, tf.shape(rows)[0] if rows.shape[0] is None else rows.shape[0])
    of_all, forward = functools.partial(function, layout=layout), None
    if not training:  # There is a faster way forward, of which no way leads back.

        def in_one_loop(rows, *banks):
            return loops.apply(function, rows, layout.rows_per_expert, banks, width)

        def in_places(*arguments):
            return function(*captured(arguments), layout=captured(layout))

        def forward(*arguments):
            return by_layout(layout, lambda: in_one_loop(*arguments), lambda: in_places(*arguments))

    if forward or recompute:
        of_all = recomputed(of_all, forward)
    return of_all(rows, *banks)


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


def multiply(rows, kernel, layout, exactly=False):
    """Multiplies each row by the matrix of its expert.

    Args:
        rows: Float tensor [R, D], as `arrange` has laid them out.
        kernel: Tensor or variable [N, D, F], maybe of another dtype, from which it is converted.
        layout: Their `Layout`.
        exactly: Whether the result has to be exact in float32, as of `exact.matmul`; the gradients
            are plain products.

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
            matmul = exact.by_parts if exactly else tf.matmul
            return places.multiply(rows, matrices, layout.places, matmul=matmul)

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
