"""Symbolic calls where shapes are static: what is asked for is the shape of the output alone.

JAX traces a symbolic call with names in place of unknown sizes, by which rows can't be divided
among experts. So there a mixture answers by its shape, and a gating is traced with a number of
examples. Only a private function tells of a symbolic call (checked with Keras 3.10 to 3.15).
"""

import keras
from keras import ops
from keras.src.backend.common.symbolic_scope import in_symbolic_scope

from keras_moe.backend import STATIC_SHAPES

_NUMBER = 2  # of examples, any


def is_symbolic(x):
    """Whether no values are computed here, and a size of `x` has no number."""
    unknown = not all(isinstance(size, int) for size in x.shape)
    return STATIC_SHAPES and unknown and in_symbolic_scope()


def empty_output(layer, x):
    """What a layer makes of `x` as far as a symbolic call asks: its shape and dtype."""
    width = layer.compute_output_shape((None, x.shape[-1]))[-1]
    return ops.zeros((*x.shape[:-1], width), layer.compute_dtype)


def number_of_rows():
    """The number of rows of symbolic ones: unknown, or a number where it has to be one."""
    return _NUMBER if STATIC_SHAPES else None


class TracedWithANumber:
    """Has a gating traced with a number of examples.

    A class that a layer inherits from before `keras.layers.Layer`. Its outputs whose first size is
    that of the input are of an unknown number.
    """

    def compute_output_spec(self, x, *args, **kwargs):
        if not STATIC_SHAPES or x.shape[0] is not None:
            return super().compute_output_spec(x, *args, **kwargs)

        def with_number(part):
            if not isinstance(part, keras.KerasTensor):
                return part
            return keras.KerasTensor((_NUMBER, *part.shape[1:]), part.dtype)

        x, args, kwargs = keras.tree.map_structure(with_number, (x, args, kwargs))
        expert_index, gates, *others = spec = super().compute_output_spec(x, *args, **kwargs)
        unknown = [keras.KerasTensor((None, *p.shape[1:]), p.dtype) for p in (expert_index, gates)]
        return type(spec)(*unknown, *others)
