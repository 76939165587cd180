"""Finite differences, to check the gradients of the oracle."""

import numpy as np

# Central differences are off by step²/6 times a third derivative and by rounding, about
# 1e-16 · |loss| / step: both about 1e-10 for losses and derivatives of order 1 to 10. The tolerance
# leaves a factor of 100 for larger third derivatives; a wrong term shows in the first digits.
STEP = 1e-5
TOLERANCE = {"rtol": 1e-6, "atol": 1e-8}


def differences(loss, array):
    """Central differences of `loss()` by every entry of `array`, which is moved in place."""
    result = np.zeros_like(array)
    for index in np.ndindex(array.shape):
        value = array[index]
        for sign in (1.0, -1.0):
            array[index] = value + sign * STEP
            result[index] += sign * loss() / (2.0 * STEP)
        array[index] = value
    return result
