"""Products of sorted rows, each with the matrix of its expert, in the shapes that are asked for."""

from keras import ops

from keras_moe.backend import STATIC_SHAPES, exact, grouped_products, indices, vectorization
from keras_moe.dispatch.blocks import block_by_block


def in_blocks(static_shapes):
    """Whether rows go block by block: for static shapes, where the backend has no other."""
    return static_shapes and not STATIC_SHAPES


def product(rows, kernel, rows_per_expert, static_shapes=False):
    """Multiplies each row by the matrix of its expert.

    Args:
        rows: Float tensor [M, D], sorted by expert.
        kernel: Tensor or variable [N, D, F]. One of another dtype than `rows`, for storage, is
            converted.
        rows_per_expert: int32 [N]. Rows behind those belong to no expert.
        static_shapes: Whether the shapes must not depend on `rows_per_expert`.

    Returns:
        Float tensor [M, F]; zeros behind the last expert's rows.
    """
    return _products(rows, [kernel], rows_per_expert, static_shapes, exactly=False)[0]


def exact_products(rows, kernels, rows_per_expert, static_shapes=False):
    """The same with each of several kernels, in float32 and exact on every device: a list."""
    return _products(rows, kernels, rows_per_expert, static_shapes, exactly=True)


def _products(rows, kernels, rows_per_expert, static_shapes, exactly):
    if in_blocks(static_shapes):
        matmul = exact.matmul if exactly else vectorization.matmul_each
        kernels = [indices.tensor(kernel) for kernel in kernels]
        return [block_by_block(matmul, rows, rows_per_expert, [kernel]) for kernel in kernels]
    layout = grouped_products.lay_out(rows_per_expert, ops.shape(rows)[0])
    rows = grouped_products.arrange(rows, layout)
    products = [grouped_products.multiply(rows, kernel, layout, exactly) for kernel in kernels]
    return [grouped_products.restore(y, layout) for y in products]
