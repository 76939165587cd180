"""Products of sorted rows, each with the matrix of its expert.

How many rows each expert has depends on the data, and no shape may. Three ways to live with that:

* On TPUs there are kernels that compute the tiles of rows that an expert has, and no others
  (`tpu_kernels.py`).
* On GPUs an expert's rows are in blocks (`places.py`) from the first product of a bank to the last
  one, and so in each product on TPUs with float16, which has no kernel.
* Elsewhere a loop over pieces of an expert's rows (`loops.py`).

`jax.lax.ragged_dot_general` says the same in one instruction. XLA computes it for GPUs, most TPUs
and CPUs by multiplying all rows by the matrices of all experts (JAX 0.10 to 0.12).

Which platform it is, is known when a traced function is lowered, and not before.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from keras_moe.backend.jax import loops, order, places, tpu_kernels
from keras_moe.backend.jax.gradients import with_gradient
from keras_moe.backend.jax.indices import gather, index_range, run_of, tensor
from keras_moe.backend.jax.recomputation import recomputed


class Layout(NamedTuple):
    """How sorted rows lie while they are multiplied: as they are.

    Attributes:
        rows_per_expert: int32 [N]. Rows behind those belong to no expert.
        num_rows: M.
    """

    rows_per_expert: Any
    num_rows: Any


def lay_out(rows_per_expert, num_rows):
    """The `Layout` of M rows, sorted by expert, for all products with them."""
    return Layout(rows_per_expert, num_rows)


def apply(function, rows, rows_per_expert, banks, width, *, training, recompute):
    """Applies each expert's function to the rows of that expert, by the fastest way there is.

    Args:
        function: Called with rows and parameters, those of all experts on all rows if it gets their
            `layout`, or else of G experts [G, ...] on their rows [G, S, D].
        rows: Float tensor [M, D], sorted by expert.
        rows_per_expert: int32 [N]. Rows behind those belong to no expert.
        banks: List of tensors [N, ...], the experts' parameters.
        width: Of the function's result.
        training: Without effect.
        recompute: Whether a backward pass computes again what is inside.

    Returns:
        Float tensor [M, width]; zeros behind the last expert's rows.
    """

    def as_they_are(rows, rows_per_expert, *banks):
        return function(rows, *banks, layout=Layout(rows_per_expert, rows.shape[0]))

    def in_places(rows, rows_per_expert, *banks):
        return places.apply(function, rows, rows_per_expert, list(banks))

    def of_all(*arguments):
        return jax.lax.platform_dependent(*arguments, cuda=in_places, default=as_they_are)

    return (recomputed(of_all) if recompute else of_all)(rows, rows_per_expert, *banks)


def arrange(rows, layout):
    """Brings sorted rows [M, D] into a `Layout`, [R, D]: nothing to do."""
    return rows


def restore(rows, layout):
    """Undoes `arrange`; zeros for rows of no expert, if they have become something else."""
    mine = index_range(rows.shape[0]) < jnp.sum(layout.rows_per_expert)
    return jnp.where(mine[:, None], rows, jnp.zeros((), rows.dtype))


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
    kernel, precision = tensor(kernel), jax.lax.Precision.HIGHEST if exactly else None
    return _product(rows, kernel, layout.rows_per_expert, precision)


def of_rows(bank, layout):
    """The parameters of each row's expert.

    Args:
        bank: Float tensor or variable [N, F].
        layout: The `Layout` of the rows.

    Returns:
        Float tensor [R, F]; zeros for rows of no expert.
    """
    table = jnp.pad(tensor(bank), [(0, 1), (0, 0)])  # Row N is for rows of no expert.
    expert = run_of(jnp.cumsum(layout.rows_per_expert), index_range(layout.num_rows))
    return gather(table, expert)


def _product(rows, kernel, rows_per_expert, precision=None, transposed=False):
    """`_times`, which can be differentiated as often as one likes."""

    def product(rows, kernel, rows_per_expert):
        return _times(rows, kernel, rows_per_expert, precision, transposed)

    def gradient(upstream, rows, kernel, rows_per_expert):
        of_rows = _product(upstream, kernel, rows_per_expert, transposed=not transposed)
        if not jnp.issubdtype(kernel.dtype, jnp.floating):  # int8
            return [of_rows, None]
        sides = (upstream, rows) if transposed else (rows, upstream)
        load = order.after(rows_per_expert, of_rows)
        return [of_rows, _outer_products(*sides, load).astype(kernel.dtype)]

    return with_gradient(product, gradient, [rows, kernel], [rows_per_expert])


def _outer_products(rows, upstream, rows_per_expert):
    """`_gradient_of_kernel`, which can be differentiated as often as one likes."""

    def gradient(of_sums, rows, upstream, rows_per_expert):
        of_rows = _product(upstream, of_sums, rows_per_expert, transposed=True)
        return [of_rows, _product(rows, of_sums, rows_per_expert)]

    return with_gradient(_gradient_of_kernel, gradient, [rows, upstream], [rows_per_expert])


def _times(rows, kernel, rows_per_expert, precision=None, transposed=False):
    """Each row times its expert's matrix, or the transposed one; zeros behind the last expert's."""

    def in_places(rows, kernel, rows_per_expert):
        def product(rows, kernel):
            kernel = jnp.swapaxes(kernel, 1, 2) if transposed else kernel
            return jnp.matmul(rows, kernel.astype(rows.dtype), precision=precision)

        return places.apply(product, rows, rows_per_expert, [kernel])

    def in_loop(rows, kernel, rows_per_expert):
        return loops.times(rows, kernel, rows_per_expert, precision, transposed)

    def by_kernel(rows, kernel, rows_per_expert):
        exactly = precision is not None
        return tpu_kernels.times(rows, kernel, rows_per_expert, exactly, transposed)

    on_tpus = by_kernel if tpu_kernels.can_multiply(rows) else in_places
    return jax.lax.platform_dependent(
        rows, kernel, rows_per_expert, tpu=on_tpus, cuda=in_places, default=in_loop
    )


def _gradient_of_kernel(rows, upstream, rows_per_expert):
    """[N, D, F]: of each expert the sum of its rows' products with their gradients."""

    def in_places(rows, upstream, rows_per_expert):
        def product(kernel):
            return places.apply(jnp.matmul, rows, rows_per_expert, [kernel])

        shape = (rows_per_expert.shape[0], rows.shape[1], upstream.shape[1])
        return jax.vjp(product, jnp.zeros(shape, rows.dtype))[1](upstream)[0]

    return jax.lax.platform_dependent(
        rows,
        upstream,
        rows_per_expert,
        tpu=tpu_kernels.gradient_of_kernel if tpu_kernels.can_multiply(rows) else in_places,
        cuda=in_places,
        default=loops.gradient_of_kernel,
    )
