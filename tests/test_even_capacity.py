"""Experts computed partly in one batch and partly alone, whatever the rule would choose."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import EXAMPLES, assert_agrees, examples, random_hierarchical, with_random_weights

from keras_moe import NoisyTopKGating, SparseMoE

MASK = np.arange(EXAMPLES) % 4 > 0
# 24 examples with 2 of 5 experts each are 10 rows per expert on average: with 0 places all of them
# go through the loop, with 7 a few, with 48 none.
PLACES = [0, 7, 48]


def choose(places, monkeypatch):
    monkeypatch.setattr("keras_moe.grouped.even_capacity", lambda *_, **__: tf.constant(places))


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_agrees_with_the_oracle(places, mask, training, monkeypatch):
    choose(places, monkeypatch)
    layer = SparseMoE(5, [4, 3], k=2, activation="swiglu", use_bias=True, seed=5)
    with_random_weights(layer)
    assert_agrees(layer, examples(), training=training, mask=mask)


@pytest.mark.parametrize("places", PLACES)
def test_a_hierarchical_layer_agrees_with_the_oracle(places, monkeypatch):
    choose(places, monkeypatch)  # The secondary gating has a batch and a loop of its own.
    layer = random_hierarchical(3, 4, 5, k=(2, 2), seed=5)
    assert_agrees(layer, examples(), training=True, mask=MASK)


@pytest.mark.parametrize("policy", ["float64", "bfloat16", "mixed_float16"])
def test_the_loop_computes_in_the_dtype_of_the_layer(policy, monkeypatch):
    def answer(places):
        choose(places, monkeypatch)
        gating = NoisyTopKGating(5, k=2, noise=False)
        layer = SparseMoE(5, 4, gating=gating, use_bias=True, recompute=True, dtype=policy)
        with_random_weights(layer)
        weights = [weight.value for weight in layer.experts.trainable_weights]
        x = keras.ops.cast(examples(), layer.compute_dtype)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        assert y.dtype == layer.compute_dtype
        gradients = tape.gradient(y, [x, *weights], output_gradients=tf.ones_like(y))
        return [np.asarray(value, "float64") for value in (y, *gradients)]

    # Sums in another order: as far apart as the rounding of the dtype.
    unit = {"float64": 1e-13, "bfloat16": 2e-2, "mixed_float16": 3e-3}[policy]
    for batched, looped in zip(answer(48), answer(3), strict=True):
        np.testing.assert_allclose(looped, batched, rtol=unit, atol=unit * np.abs(batched).max())


def test_few_rows_leave_the_weights_of_other_experts_alone():
    # P = 2·256·512, so a turn of the loop costs 60 + 4.5·10⁶/P ≈ 77 rows, 4 of them about 310; a
    # batch reads the weights of all 80: 80·(50 + 1) = 4080.
    layer = SparseMoE(80, 512, k=2)
    layer.build((None, 256))
    layer.gating.gate_kernel.assign(np.random.default_rng(0).normal(size=(256, 80)))
    x = np.random.default_rng(1).normal(size=(2, 256)).astype("float32")
    sound = layer(x)
    chosen = np.unique(layer.route(x).expert_index)
    for kernel in layer.experts.kernels:
        poisoned = np.full(kernel.shape, np.nan, "float32")
        poisoned[chosen] = kernel.numpy()[chosen]
        kernel.assign(poisoned)
    np.testing.assert_array_equal(layer(x), sound)
