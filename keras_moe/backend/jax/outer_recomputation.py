"""Recomputation by others, `jax.checkpoint` and `keras.remat` around a mixture.

What a function leaves behind another way than by its result, as losses that a layer adds, JAX
refuses itself. Noise is the same again, as its seed is a value of the function that is traced.
"""

import contextlib


def recording(x):
    """Nothing to be told."""
    return contextlib.nullcontext()


def unrecorded():
    """Nothing to be told."""
    return contextlib.nullcontext()


def is_lost():
    """Whether what is computed here has no gradient."""
    return False


class Draws:
    """Seeds that a recomputed function gets again when it runs again."""

    def next(self, draw):
        """Returns what the function `draw` returns."""
        return draw()
