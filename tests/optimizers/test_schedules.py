"""`WarmupInverseSqrt` at steps whose rates can be told by hand, and in an optimizer."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.optimizers import WarmupInverseSqrt


@pytest.mark.parametrize("dtype", [None, "int32", "int64", "float32"])
def test_the_rate_rises_is_held_and_falls(dtype):
    schedule = WarmupInverseSqrt(0.5, warmup_steps=4, hold_steps=5)
    steps = [0, 1, 3, 6, 8, 35, 80]
    if dtype is not None:
        steps = [ops.convert_to_tensor(np.asarray(step, dtype)) for step in steps]
    rates = [float(schedule(step)) for step in steps]
    # Updates 1, 2 and 4 of 4 on the way up; 7 and 9, still held; 36 = 4·9 and 81 = 9·9.
    np.testing.assert_allclose(rates, [0.125, 0.25, 0.5, 0.5, 0.5, 0.25, 0.5 / 3], rtol=1e-6)


def test_without_holding_the_peak_is_a_single_step():
    schedule = WarmupInverseSqrt(1.0, warmup_steps=4)
    # √(4/5) behind the peak, and 1/2 at four times the warm-up.
    rates = [float(schedule(step)) for step in (2, 3, 4, 15)]
    np.testing.assert_allclose(rates, [0.75, 1.0, 0.8**0.5, 0.5], rtol=1e-6)


def test_a_billion_steps_later_the_rate_is_exact():
    schedule = WarmupInverseSqrt(1.0, warmup_steps=1000)
    step = ops.convert_to_tensor(10**9 - 1, "int32")
    assert schedule(step).dtype == "float32"
    np.testing.assert_allclose(schedule(step), 1e-3, rtol=1e-5)


def test_an_optimizer_takes_it_and_saves_it():
    optimizer = keras.optimizers.SGD(WarmupInverseSqrt(1.0, 2, 3))
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    variable = keras.Variable([0.0])
    again.build([variable])
    for _ in range(2):
        again.apply([ops.ones([1])])
    np.testing.assert_allclose(variable, [-1.5])  # 1/2, then 2/2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 4), "peak.*Received: 0.0"),
        ((1.0, 0), "warmup_steps.*Received: .*0"),
        ((1.0, 4, -1), "hold_steps.*Received: .*-1"),
        ((1.0, 2.5), "warmup_steps.*Received: .*2.5"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        WarmupInverseSqrt(*arguments)
