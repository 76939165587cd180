"""SparseMoE: its numbers against the oracle."""

import hypothesis
import keras
import numpy as np
import pytest
from combinations import draws
from helpers import (
    EXAMPLES,
    WIDTH,
    assert_agrees,
    assign_random_weights,
    examples,
    oracle,
    run,
    with_random_weights,
)
from hypothesis import strategies as st
from inputs import policies, rounded
from keras.ops import convert_to_numpy as numpy

from keras_moe import NoisyTopKGating, SparseMoE

pytestmark = pytest.mark.covering

HIDDEN = 5


def sizes():
    return sorted({(n, k) for n in (1, 2, 7, 64) for k in (1, 2, 4, n) if k <= n})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("num_experts", "k"), sizes())
def test_noisy_top_k_agrees_with_the_oracle(num_experts, k, training):
    rng = np.random.default_rng(num_experts * 100 + k)
    layer = SparseMoE(num_experts, HIDDEN, k=k, output_dim=4, seed=7)
    x = rng.normal(size=(EXAMPLES, WIDTH)).astype("float32")
    layer.build(x.shape)
    assign_random_weights(layer, rng)
    assert_agrees(layer, x, training=training)


@pytest.mark.parametrize("num_experts", [1, 2, 7, 64])
def test_softmax_gating_agrees_with_the_oracle(num_experts):
    rng = np.random.default_rng(num_experts)
    layer = SparseMoE(num_experts, HIDDEN, gating="softmax")
    x = rng.normal(size=(EXAMPLES, WIDTH)).astype("float32")
    layer.build(x.shape)
    assign_random_weights(layer, rng)
    assert_agrees(layer, x, training=True)


@pytest.mark.parametrize("training", [True, False])
def test_biases_deep_experts_and_a_mask_agree_with_the_oracle(training):
    rng = np.random.default_rng(3)
    layer = SparseMoE(7, [5, 4], k=2, use_bias=True, activation="tanh", seed=11)
    x = rng.normal(size=(EXAMPLES, WIDTH)).astype("float32")
    layer.build(x.shape)
    assign_random_weights(layer, rng)
    assert_agrees(layer, x, training=training, mask=rng.random(EXAMPLES) < 0.6)


@hypothesis.settings(max_examples=draws(40, in_jax=12), deadline=None)
@hypothesis.given(data=st.data())
def test_any_shape_agrees_with_the_oracle(data):
    num_experts = data.draw(st.integers(1, 9), label="num_experts")
    k = data.draw(st.integers(1, num_experts), label="k")
    leading = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3), label="leading")
    width = data.draw(st.integers(1, 5), label="width")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31), label="seed"))
    x = rng.normal(size=(*leading, width)).astype("float32")
    mask = rng.random(leading) < 0.7 if data.draw(st.booleans(), label="masked") else None
    layer = SparseMoE(num_experts, 3, k=k)
    layer.build(x.shape)
    assign_random_weights(layer, rng)
    y = layer(x, mask=mask)
    flat_mask = None if mask is None else mask.reshape(-1)
    expected = oracle(layer, x.reshape(-1, width), training=False, mask=flat_mask)
    assert y.shape == x.shape
    np.testing.assert_allclose(np.reshape(y, [-1, width]), expected.y, rtol=1e-4, atol=1e-5)
    routing = layer.route(x, mask=mask)
    np.testing.assert_allclose(routing.load, expected.load)
    np.testing.assert_allclose(routing.importance, expected.importance, rtol=1e-5, atol=1e-6)


@pytest.mark.tensorflow("what is computed under JAX on_jax/test_products.py counts")
@pytest.mark.cpu
@pytest.mark.parametrize("training", [True, False])
def test_experts_compute_their_own_rows_alone(training):
    computed = []

    def recording_relu(z):
        computed.append(z.shape[:-1])
        return keras.ops.relu(z)

    gating = NoisyTopKGating(16, k=3, noise=False)
    layer = SparseMoE(16, 8, gating=gating, activation=recording_relu)
    x = np.random.default_rng(0).normal(size=(5, 10, WIDTH))
    mask = np.arange(50).reshape(5, 10) < 7
    layer.build(x.shape)
    assign_random_weights(layer, np.random.default_rng(1))
    layer(x, training=training, mask=mask)
    load = layer.route(x, mask=mask).load
    assert sum(load) == 7 * 3  # each example that isn't masked, once per choice
    assert min(load) == 0
    if training:  # All rows at once; those of choices that don't count are zeros.
        assert computed == [(50 * 3,)]
    else:  # From expert to expert, of those that have rows.
        assert computed == [(int(rows),) for rows in load if rows > 0]


def test_ties_go_to_the_lowest_index():
    layer = SparseMoE(8, 4, k=3)
    routing = layer.route(np.ones((2, WIDTH), "float32"))  # zero kernels: all logits are equal
    np.testing.assert_array_equal(routing.expert_index, [[0, 1, 2]] * 2)
    np.testing.assert_allclose(routing.gates, np.full((2, 3), 1 / 3))


def test_the_noise_repeats_with_the_seed_and_spreads_the_load():
    x = np.ones((512, WIDTH), "float32")
    first, again, other = (
        SparseMoE(8, 4, k=2, seed=seed).route(x, training=True) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.expert_index, again.expert_index)
    assert np.any(first.expert_index != other.expert_index)
    # Without signal every expert has the same chance, K/N of 512 examples; the estimate of it is
    # the same for all but for the noise of the thresholds.
    np.testing.assert_allclose(first.load, np.full(8, 512 * 2 / 8), rtol=0.1)


def test_losses_are_importance_then_load_then_others():
    layer = SparseMoE(4, 3, k=1, kernel_regularizer="l2", load_loss_weight=0.5)
    x = np.ones((10, WIDTH), "float32")
    layer(x)
    # All to expert 0, whose gate is 1/4: CV² of [2.5, 0, 0, 0] and of [10, 0, 0, 0] is N - 1 = 3.
    importance_loss, load_loss, *regularization = layer.losses
    np.testing.assert_allclose(importance_loss, 0.1 * 3, rtol=1e-6)
    np.testing.assert_allclose(load_loss, 0.5 * 3, rtol=1e-6)
    expected = [0.01 * np.square(numpy(kernel)).sum() for kernel in layer.experts.kernels]
    np.testing.assert_allclose(regularization, expected, rtol=1e-5)


@pytest.mark.parametrize("gating", ["noisy_top_k", "softmax"])
@pytest.mark.parametrize("training", [True, False])
def test_z_loss_agrees_with_the_oracle(gating, training):
    layer = SparseMoE(7, 3, k=2, gating=gating, router_z_loss_weight=0.2, seed=3, use_bias=True)
    layer = with_random_weights(layer)
    mask = np.arange(EXAMPLES) % 3 > 0
    expected = assert_agrees(layer, examples(), training=training, mask=mask)
    layer(examples(), training=training, mask=mask)
    assert len(layer.losses) == 3  # Behind importance and load; before a regularizer's.
    np.testing.assert_allclose(layer.losses[2], expected.router_z_loss, rtol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_stays_close_to_float32(policy):
    x = np.random.default_rng(0).normal(size=(EXAMPLES, WIDTH)).astype("float32")
    full = SparseMoE(4, HIDDEN, k=2, seed=1)
    mixed = SparseMoE(4, HIDDEN, k=2, seed=1, dtype=policy)
    for layer in (full, mixed):
        layer.build(x.shape)
    assign_random_weights(full, np.random.default_rng(1))
    mixed.set_weights(full.get_weights())
    exact = mixed.route(x)
    # From here on numbers that both can hold, so that both choose the same experts.
    x = rounded(x, mixed.compute_dtype)
    np.testing.assert_array_equal(exact.gates, mixed.route(x).gates)  # `route` rounds as a call
    np.testing.assert_array_equal(mixed.route(x).expert_index, full.route(x).expert_index)
    (y_full, d_full), (y_mixed, d_mixed) = (
        (step["y"], step["gradients"])
        for step in (run(layer, x, np.ones_like(x), training=False) for layer in (full, mixed))
    )
    assert y_mixed.dtype == mixed.compute_dtype
    # 11 and 8 significant bits in the products: 2⁻¹¹ and 2⁻⁸, a few of them added up.
    tolerance = 2.0**-8 if policy == "mixed_float16" else 2.0**-5
    for name in ("x", "gate_kernel", "kernels"):
        for ours, theirs in zip(
            keras.tree.flatten(d_mixed[name]), keras.tree.flatten(d_full[name]), strict=True
        ):
            scale = np.abs(theirs).max()
            np.testing.assert_allclose(ours / scale, theirs / scale, atol=tolerance, err_msg=name)
    np.testing.assert_allclose(np.float32(y_mixed), y_full, atol=tolerance * np.abs(y_full).max())


@pytest.mark.parametrize("floatx", policies("float64", "float16"))
def test_the_noise_does_not_depend_on_floatx(floatx):
    keras.config.set_floatx(floatx)
    try:
        y = SparseMoE(4, 8, k=2)(np.ones((3, WIDTH)), training=True)
    finally:
        keras.config.set_floatx("float32")
    assert np.isfinite(y).all()
