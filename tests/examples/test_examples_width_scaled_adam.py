"""Smaller steps for the layers of experts that have many inputs."""

import keras
import numpy as np
import pytest
from keras.ops import convert_to_numpy as numpy
from width_scaled_adam import WidthScaledAdam

from keras_moe import HierarchicalMoE


def test_kernels_of_experts_move_less_the_more_inputs_they_have():
    moe = HierarchicalMoE(2, 3, hidden_units=16, output_dim=5)
    dense = keras.layers.Dense(16)
    model = keras.Sequential([keras.Input((8,)), dense, moe])
    variables = model.trainable_variables
    before = [numpy(variable) for variable in variables]
    WidthScaledAdam(0.01, full_rate_inputs=4).apply([v * 0.0 + 3.0 for v in variables], variables)
    moved = {v.path: b - numpy(v) for v, b in zip(variables, before, strict=True)}
    # Adam's first step is the learning rate, whatever the gradient: 0.01. Of the kernels [N, 16,
    # 16] and [N, 16, 5] of experts it is 4 / 16 of that; the rest, gating kernels [2, 16, 3]
    # among it, isn't of experts.
    for kernel in moe.experts.kernels:
        np.testing.assert_allclose(moved.pop(kernel.path), 0.0025, rtol=1e-3)
    assert len(moved) >= 6
    for change in moved.values():
        np.testing.assert_allclose(change, 0.01, rtol=1e-3)


def test_up_to_so_many_inputs_it_is_adam():
    x = np.random.default_rng(0).normal(size=(20, 8)).astype("float32")
    outputs = []
    for optimizer in (keras.optimizers.Adam(0.01), WidthScaledAdam(0.01, full_rate_inputs=16)):
        keras.utils.set_random_seed(0)
        moe = HierarchicalMoE(2, 3, hidden_units=16)
        model = keras.Sequential([keras.Input((8,)), moe])
        model.compile(optimizer, "mse")
        model.fit(x, x, batch_size=10, verbose=0)
        outputs.append(model.predict(x, verbose=0))
    np.testing.assert_array_equal(*outputs)


def test_fewer_inputs_than_one_are_refused():
    with pytest.raises(ValueError, match="at least 1. Received: -256"):
        WidthScaledAdam(0.01, full_rate_inputs=-256)


def test_a_configuration_makes_the_same():
    made = WidthScaledAdam(0.01, full_rate_inputs=16, beta_1=0.8)
    again = keras.optimizers.deserialize(keras.optimizers.serialize(made))
    assert isinstance(again, WidthScaledAdam)
    assert again.get_config() == made.get_config()
