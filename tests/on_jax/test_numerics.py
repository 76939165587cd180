"""Each way through the layers under JAX against the oracle, outputs and all gradients."""

import keras
import numpy as np
import pytest
from helpers import (
    EVERY_LAYER,
    assert_agrees,
    assign_random_weights,
    call_and_gradients,
    examples,
    numpy,
    with_random_weights,
)

from keras_moe import HierarchicalMoE, SparseMoE

VARIANTS = {
    **EVERY_LAYER,
    "k = 1": lambda **options: SparseMoE(5, 4, k=1, **options),
    "hierarchical_balanced": lambda **options: HierarchicalMoE(
        2, 3, 4, gating="strictly_balanced", **options
    ),
    "shared, recomputed": lambda **options: SparseMoE(
        5, [4, 3], k=2, num_shared_experts=2, recompute=True, **options
    ),
}
MASK = np.arange(24) % 5 != 0


@pytest.mark.parametrize("make", VARIANTS.values(), ids=VARIANTS)
def test_training_agrees_with_the_oracle(make):
    layer = with_random_weights(make(seed=0, use_bias=True, router_z_loss_weight=0.1))
    assert_agrees(layer, examples(), training=True, mask=MASK)


def test_inference_agrees_with_the_oracle():
    layer = with_random_weights(SparseMoE(5, 4, k=2))
    assert_agrees(layer, examples(), training=False)


def test_one_example_as_among_others():
    layer = with_random_weights(SparseMoE(5, [4, 3], k=2, use_bias=True))
    x = examples()
    np.testing.assert_allclose(layer(x[:1]), layer(x)[:1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"capacity_factor": 2.5}], ids=str)
def test_experts_that_are_layers(options):
    """The same clones as the experts of a bank: dense layers with the same weights."""
    expert = keras.Sequential([keras.layers.Dense(4, "tanh"), keras.layers.Dense(6)])
    layer = SparseMoE(3, experts=expert, k=2, seed=0, **options)
    bank = SparseMoE(3, 4, k=2, seed=0, activation="tanh", use_bias=True, **options)
    for one in (layer, bank):
        one.build((None, 6))
    assign_random_weights(bank, np.random.default_rng(0))
    layer.gating.set_weights(bank.gating.get_weights())
    pairs = zip(bank.experts.kernels, bank.experts.biases, strict=True)
    weights = [part for pair in pairs for part in pair]
    for i, clone in enumerate(layer.experts.layers):
        clone.set_weights([numpy(weight)[i] for weight in weights])
    y, _, gradients = call_and_gradients(layer, examples(), training=True)
    wanted, _, wanted_gradients = call_and_gradients(bank, examples(), training=True)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradients[0], wanted_gradients[0], rtol=1e-4, atol=1e-4)


def test_experts_that_count_their_rows_are_refused():
    for part in (
        keras.layers.Dense(6, activity_regularizer="l2"),
        keras.layers.BatchNormalization(),
    ):
        layer = SparseMoE(3, experts=keras.Sequential([part]), k=2)
        with pytest.raises(ValueError, match="Set `capacity_factor`"):
            layer(examples(), training=True)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy):
    exact = with_random_weights(SparseMoE(5, 4, k=2))
    layer = SparseMoE(5, 4, k=2, dtype=policy)
    layer.build((None, 6))
    layer.set_weights(exact.get_weights())
    # Gating computes in float32, but of inputs in the layer's precision.
    x = np.float32(keras.ops.cast(examples(), policy.removeprefix("mixed_")))
    y = layer(x)
    assert keras.backend.standardize_dtype(y.dtype) == policy.removeprefix("mixed_")
    # Two products and what goes into them, each rounded to 8 or 11 bits, of numbers around 10.
    np.testing.assert_allclose(np.float32(y), exact(x), rtol=0.05, atol=0.3)


def test_int8_refuses_to_train():
    layer = with_random_weights(SparseMoE(5, 4, k=2))
    x = examples()
    before = numpy(layer(x))
    layer.experts.quantize("int8")
    # A weight of up to 4 is off by 4 / 127 / 2 at most, in two products of 6 and 4 terms.
    np.testing.assert_allclose(layer(x), before, atol=0.02 * np.abs(before).max())
    with pytest.raises(ValueError, match="Experts in int8 are there to be used"):
        call_and_gradients(layer, x, training=True)


@pytest.mark.parametrize("gating", ["noisy_top_k", "strictly_balanced"])
def test_a_broken_example_keeps_it_to_itself(gating):
    layer = with_random_weights(SparseMoE(5, 4, k=2, gating=gating))
    x = examples()
    wanted = numpy(call_and_gradients(layer, x, training=False)[0])
    x[3] = np.nan
    y = numpy(call_and_gradients(layer, x, training=False)[0])
    assert np.all(np.isnan(y[3]))
    others = np.arange(len(x)) != 3
    np.testing.assert_allclose(y[others], wanted[others], rtol=1e-5, atol=1e-5)
