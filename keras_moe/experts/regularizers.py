"""Regularizers of banks: of the matrices of each expert."""

import keras
from keras import ops

# Sums over entries, of however many matrices: once for all costs less.
_SUMS_OVER_ENTRIES = (keras.regularizers.L1, keras.regularizers.L2, keras.regularizers.L1L2)


def of_each_expert(regularizer, halves=1):
    """Makes a regularizer of a single matrix or vector one of a bank of N of them.

    Args:
        regularizer: What `keras.regularizers.get` returns: a function, or `None`.
        halves: 2 where each expert has two matrices side by side, as of a gated layer.

    Returns:
        A regularizer of a variable [N, …]: the sum of what the regularizer makes of each expert's
        part, of each half by itself; `None` for `None`.
    """
    if regularizer is None or type(regularizer) in _SUMS_OVER_ENTRIES:
        return regularizer
    return _OfEachExpert(regularizer, halves)


class _OfEachExpert(keras.regularizers.Regularizer):
    """A class, as variables of Keras 3.10 take no function."""

    def __init__(self, regularizer, halves):
        self.regularizer, self.halves = regularizer, halves

    def __call__(self, bank):
        parts = ops.concatenate(ops.split(ops.convert_to_tensor(bank), self.halves, axis=-1))
        return ops.sum(ops.map(self.regularizer, parts))
