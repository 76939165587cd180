"""Initial values of a bank: every expert is drawn for itself."""

import keras
import numpy as np
from keras import ops


class PerExpert(keras.initializers.Initializer):
    """Draws each expert's part of a bank [N, …] by itself.

    An initializer applied to the bank as a whole would take N for the receptive field of a
    convolution and draw all weights too small by √N.

    Args:
        initializer: The initializer of one expert's part.
        layer: The number of the layer within an expert.
        halves: 2 for the matrix of a gated layer, two matrices side by side; otherwise 1.
    """

    def __init__(self, initializer, layer, halves=1):
        self.initializer = initializer
        self.layer = layer
        self.halves = halves

    def __call__(self, shape, dtype=None):
        num_experts, *rest, columns = shape
        parts = num_experts * self.halves
        part_shape = (*rest, columns // self.halves)
        seed = getattr(self.initializer, "seed", None)
        if not isinstance(seed, int):  # Nothing random, or a generator, new at every draw.
            draws = [self.initializer] * parts
        else:
            # Keras repeats the values of a seed: each layer of each expert needs its own.
            config = self.initializer.get_config()
            draws = [
                type(self.initializer).from_config({**config, "seed": derived})
                for derived in derived_seeds(seed, self.layer, parts)
            ]
        values = [draw(part_shape, dtype=dtype) for draw in draws]
        if self.halves == 1:
            return ops.stack(values)
        pairs = zip(values[::2], values[1::2], strict=True)
        return ops.stack([ops.concatenate(pair, axis=-1) for pair in pairs])


def derived_seeds(seed, stream, number):
    """`number` seeds that depend on a seed and on what they are for."""
    generator = np.random.default_rng([abs(seed), stream])
    return [int(derived) for derived in generator.integers(2**31, size=number)]
