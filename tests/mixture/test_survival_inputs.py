"""Whatever the input, every kind of layer stands it: sizes, masks, broken and huge numbers."""

import keras
import numpy as np
import pytest
from combinations import few_in_jax
from helpers import (
    EVERY_LAYER,
    WIDTH,
    call_and_gradients,
    call_gradients_and_routing,
    metrics,
    with_random_weights,
)
from inputs import policies, rounded
from keras.ops import convert_to_numpy as numpy
from reference_capacity import admit, capacity
from reference_experts import mixture

from keras_moe import HierarchicalMoE, SparseMoE

pytestmark = pytest.mark.covering
SOME = ("noisy_top_k", "softmax", "balanced_capacity", "hierarchical")
every_layer = pytest.mark.parametrize("make", few_in_jax(EVERY_LAYER, SOME))


def examples(number, seed=0):
    return np.random.default_rng(seed).normal(size=(number, WIDTH)).astype("float32")


def dense_gates(routing, num_experts):
    gates = np.zeros((len(routing.gates), num_experts))
    np.put_along_axis(gates, numpy(routing.expert_index), numpy(routing.gates), axis=1)
    return gates


def by_hand(layer, x, routing, *, training):
    """Σ gate · expert(x) over the choices that found a place, one by one."""
    gates = dense_gates(routing, layer.num_experts)
    factor = layer.capacity_factor if training else None
    k = np.prod(layer.k)
    most = capacity(factor, k, len(x), layer.num_experts)
    admitted, _ = admit(numpy(routing.expert_index), gates, most)
    kernels = [numpy(kernel) for kernel in layer.experts.kernels]
    no_biases = [np.zeros(kernel.shape[::2]) for kernel in kernels]
    return mixture(x, gates * admitted, kernels, no_biases, "relu")[0]


@every_layer
@pytest.mark.parametrize("leading", [(0,), (3, 0), (0, 2, 2)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_no_examples(make, leading, masked, training):
    layer = with_random_weights(make(num_shared_experts=1, router_z_loss_weight=0.1))
    mask = np.zeros(leading, bool) if masked else None
    x = np.zeros((*leading, WIDTH), "float32")
    y, losses, gradients = call_and_gradients(layer, x, training=training, mask=mask)
    assert y.shape == x.shape
    np.testing.assert_array_equal(losses, np.zeros(len(losses)))
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))


@every_layer
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("value", [1.0, np.nan, np.inf])
def test_no_example_that_counts(make, training, value):
    layer = with_random_weights(make(num_shared_experts=1, router_z_loss_weight=0.1))
    x = np.full((2, 3, WIDTH), value, "float32")
    mask = np.zeros((2, 3), bool)
    for result in call_and_gradients(layer, x, training=training, mask=mask):
        for array in keras.tree.flatten(result):
            np.testing.assert_array_equal(array, np.zeros(array.shape))


@every_layer
@pytest.mark.parametrize("broken_rows", [[1, 4], range(1, 6)], ids=["some", "most"])
def test_a_masked_broken_example_reaches_neither_outputs_nor_gradients(make, broken_rows):
    layer, x = with_random_weights(make()), examples(6)
    x[broken_rows] = np.nan
    y, losses, gradients = call_and_gradients(layer, x, training=True, mask=~np.isnan(x[:, 0]))
    np.testing.assert_array_equal(numpy(y)[broken_rows], np.zeros((len(broken_rows), WIDTH)))
    for array in (y, *losses, *gradients):
        assert np.isfinite(array).all()


@every_layer
@pytest.mark.parametrize("number", [1, 3])  # of 5 or 6 experts
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_fewer_examples_than_experts(make, number, training):
    layer, x = with_random_weights(make()), examples(number)
    y, losses, gradients, routing = call_gradients_and_routing(layer, x, training=training)
    expected = by_hand(layer, x, routing, training=training)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    for array in (*losses, *gradients):
        assert np.isfinite(array).all()


@every_layer
def test_all_examples_to_one_expert(make):
    layer, x = with_random_weights(make()), examples(20)
    x[:, 0] = 1.0
    # A margin of 200 for expert 3, or for the first expert of group 1 of 2: exp(-200) is 0.
    for kernel, favourite in (
        [(layer.gating.primary, 1), (layer.gating.secondary, 0)]
        if isinstance(layer, HierarchicalMoE)
        else [(layer.gating.gate_kernel, 3)]
    ):
        margin = np.zeros(kernel.shape)
        margin[..., 0, favourite] = 200.0
        kernel.assign(margin)
    if "balanced" in make_name(make):
        layer.gating.thresholds.assign(np.zeros(5))
    routing = layer.route(x)
    only = np.eye(layer.num_experts)[3]
    np.testing.assert_array_equal(routing.load, 20 * only)
    # TensorFlow's softmax of a sure choice is 1 - 2^-24, the float32 below 1, on some processors.
    # Each level has one such factor: two of 2^-24, and the sum of 20 rounds by as much again.
    np.testing.assert_allclose(routing.importance, 20 * only, rtol=1e-6)
    up, down = (numpy(kernel)[3] for kernel in layer.experts.kernels)
    y = layer(x)
    np.testing.assert_allclose(y, np.maximum(x @ up, 0) @ down, rtol=1e-4, atol=1e-5)
    # CV² of a vector with one entry that isn't zero: N - 1.
    np.testing.assert_allclose(layer.losses[:2], [0.1 * (layer.num_experts - 1)] * 2, rtol=1e-5)
    for array in call_and_gradients(layer, x, training=True)[2]:
        assert np.isfinite(array).all()


def make_name(make):
    return next(name for name, other in EVERY_LAYER.items() if other is make)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("capacity_factor", [None, 1.0])
@pytest.mark.parametrize("gating", ["noisy_top_k", "softmax", "strictly_balanced", "hierarchical"])
def test_a_single_expert_equals_the_bare_expert(gating, capacity_factor, training):
    layer = (
        HierarchicalMoE(1, 1, 4, k=(1, 1), capacity_factor=capacity_factor)
        if gating == "hierarchical"
        else SparseMoE(1, 4, k=1, gating=gating, capacity_factor=capacity_factor)
    )
    x = examples(9)
    y = layer(x, training=training)
    up, down = (numpy(kernel)[0] for kernel in layer.experts.kernels)
    np.testing.assert_allclose(y, np.maximum(x @ up, 0) @ down, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(layer.losses, np.zeros(len(layer.losses)))


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
@pytest.mark.parametrize("gating", ["noisy_top_k", "strictly_balanced"])
def test_k_of_n_equals_softmax_gating(gating, capacity_factor):
    dense = with_random_weights(SparseMoE(5, 4, gating="softmax"))
    layer = SparseMoE(5, 4, k=5, gating=gating, capacity_factor=capacity_factor)
    layer.build((None, WIDTH))
    layer.gating.gate_kernel.assign(dense.gating.gate_kernel)
    layer.experts.set_weights(dense.experts.get_weights())
    x = examples(12)
    # Of 12 examples every expert keeps ceil(5·12 / 5) = 12, and has as many places. Noise there
    # is only in the training of noisy gating.
    y = layer(x, training=gating == "strictly_balanced")
    np.testing.assert_allclose(y, dense(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [0, 6])
@pytest.mark.parametrize("gating", ["noisy_top_k", "strictly_balanced"])
def test_a_k_outside_1_to_n_is_refused(gating, k):
    with pytest.raises(ValueError, match=f"between 1 and .* Received: k={k}, num_experts=5"):
        SparseMoE(5, 4, k=k, gating=gating)


@every_layer
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_broken_example_stays_in_its_own_row(make, value, training):
    layer, again, x = (*(with_random_weights(make(seed=3)) for _ in range(2)), examples(8))
    sound = numpy(again(x, training=training))
    x[3, 2] = value
    with layer.recorded_routings() as routings:
        y = numpy(layer(x, training=training))
    others = np.delete(y, 3, axis=0)
    assert not np.isfinite(y[3]).all()
    assert np.isfinite(others).all()
    for array in (*layer.losses, routings[0].load, routings[0].importance):
        assert np.isfinite(array).all()
    index = numpy(routings[0].expert_index)
    assert 0 <= index.min() and index.max() < layer.num_experts
    # In training others move up to the place that it leaves.
    if not (training and ("balanced" in make_name(make) or layer.capacity_factor)):
        np.testing.assert_allclose(others, np.delete(sound, 3, axis=0), rtol=1e-5, atol=1e-5)


@every_layer
def test_nothing_but_broken_examples_leaves_the_experts_alone(make):
    layer = with_random_weights(make())
    x = np.full((6, WIDTH), np.nan, "float32")
    y, losses, gradients = call_and_gradients(layer, x, training=True)
    assert np.isnan(y).all()
    np.testing.assert_array_equal(losses, np.zeros(len(losses)))
    # No expert has a row.
    for gradient in gradients[-len(layer.experts.kernels) :]:
        np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))


@every_layer
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_the_largest_numbers_of_float16(make, training):
    x = 6e4 * np.sign(examples(24)).astype("float16")
    layer = with_random_weights(make(dtype="mixed_float16"))
    with layer.recorded_routings() as routings:
        layer(x, training=training)
    routing = routings[0]
    for array in (*layer.losses, routing.gates, routing.importance, routing.load):
        assert np.isfinite(array).all()
    index = numpy(routing.expert_index)
    assert 0 <= index.min() and index.max() < layer.num_experts


@pytest.mark.parametrize("make", [SparseMoE, HierarchicalMoE])
def test_a_vanishing_noise_kernel_and_huge_margins_stay_finite(make):
    layer = make(4, 4, k=2) if make is SparseMoE else make(2, 2, 4, k=(1, 1))
    layer.build((None, 2))
    names = {"gate_kernel": [1, -1, 2, -2], "primary": [-1, 1], "secondary": [2, -2]}
    for name, margins in names.items():
        if hasattr(layer.gating, name):
            kernel = getattr(layer.gating, name)
            kernel.assign(np.full(kernel.shape, 1e4) * margins)
    for name in ("noise_kernel", "primary_noise", "secondary_noise"):
        if hasattr(layer.gating, name):
            kernel = getattr(layer.gating, name)
            kernel.assign(np.full(kernel.shape, -50.0))
    x = np.ones((8, 2), "float32")
    # Margins of 10⁴ over a deviation of 0.01: certainly experts 2 and 0, or 0 of group 1.
    expected = [8, 0, 8, 0] if make is SparseMoE else [0, 0, 8, 0]
    np.testing.assert_allclose(layer.route(x, training=True).load, expected, atol=1e-6)
    y, losses, gradients = call_and_gradients(layer, x, training=True)
    for array in (y, *losses, *gradients):
        assert np.isfinite(array).all()


@every_layer
def test_training_may_be_none(make):
    layer, x = with_random_weights(make()), examples(7)
    evaluated = numpy(layer(x, training=False))
    for training in ({}, {"training": None}, {"training": 0}):
        np.testing.assert_array_equal(layer(x, **training), evaluated)
    balance = metrics(layer)
    layer(x + 1.0)  # A bare call is no part of the logs.
    assert metrics(layer) == balance


@pytest.mark.parametrize("policy", policies("float64", "float16", "bfloat16"))
@every_layer
def test_other_dtypes(make, policy):
    layer = with_random_weights(make(dtype=policy, use_bias=True))
    exact = with_random_weights(make(use_bias=True))
    exact.set_weights([np.float32(weight) for weight in layer.get_weights()])
    x = rounded(examples(8), policy)
    y = layer(x, training=False)
    assert y.dtype == policy
    tolerance = {"float64": 1e-5, "float16": 2.0**-8, "bfloat16": 2.0**-5}[policy]
    expected = numpy(exact(x, training=False))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(np.float32(y), expected, atol=tolerance * scale)
    y, losses, gradients = call_and_gradients(layer, x.astype(policy), training=True)
    for array in (y, *losses, *gradients):
        assert np.isfinite(np.float32(array)).all()
    assert {weight.dtype for weight in layer.gating.trainable_weights} == {"float32"}


def ragged():
    import tensorflow as tf

    return tf.RaggedTensor.from_row_lengths(tf.ones((5, WIDTH)), [2, 3])


@pytest.mark.tensorflow("JAX has no ragged tensors")
@pytest.mark.parametrize("x", [ragged, lambda: keras.Input((None, WIDTH), ragged=True)])
@pytest.mark.parametrize("name", ["noisy_top_k", "hierarchical"])
def test_ragged_input_is_refused(name, x):
    layer = EVERY_LAYER[name]()
    message = f"^{type(layer).__name__} takes no ragged input.*x.to_tensor.*Received: "
    for _ in range(2):  # not built, built
        with pytest.raises(ValueError, match=message):
            layer(x())
        layer(np.ones((2, 3, WIDTH)))
    with pytest.raises(ValueError, match=message):
        layer.route(x())
    with pytest.raises(ValueError, match="takes no ragged input"):
        keras.Sequential([layer]).predict(ragged(), verbose=0)


# Without a capacity such experts are refused under JAX: tests/on_jax/test_numerics.py.
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    "capacity_factor", [1.0] if keras.config.backend() == "jax" else [None, 1.0]
)
def test_experts_that_take_means_of_their_rows_get_one(capacity_factor, number):
    expert = keras.Sequential([keras.layers.BatchNormalization(), keras.layers.Dense(WIDTH)])
    layer = SparseMoE(3, experts=expert, k=2, capacity_factor=capacity_factor, num_shared_experts=1)
    layer.build((None, WIDTH))
    y, losses, gradients = call_and_gradients(layer, examples(number), training=True)
    assert y.shape == (number, WIDTH)
    for array in (y, *losses, *gradients, *layer.get_weights()):
        assert np.isfinite(array).all()
