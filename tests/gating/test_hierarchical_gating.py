"""The gating of two levels: what it costs, what it chooses, and its noise."""

import math

import numpy as np
import pytest
from gradients import with_gradients
from helpers import EXAMPLES, WIDTH, assign_random_weights, examples, random_hierarchical
from keras import ops
from keras.ops import convert_to_numpy as numpy

from keras_moe import HierarchicalGating, HierarchicalMoE

HIDDEN = 5
KERNELS = ("primary", "secondary", "primary_noise", "secondary_noise")


@pytest.mark.tensorflow("it counts calls of tf.matmul; under JAX a loop over rows computes")
@pytest.mark.cpu
@pytest.mark.parametrize("training", [True, False])
def test_gating_multiplies_each_example_with_its_own_groups(training, monkeypatch):
    import tensorflow as tf

    products = []
    matmul = tf.matmul

    def recording_matmul(a, b, *args, **kwargs):
        products.append(math.prod(a.shape) * b.shape[-1])
        return matmul(a, b, *args, **kwargs)

    gating = HierarchicalGating(32, 16, k=(3, 2))
    gating.build((None, WIDTH))
    assign_random_weights(gating, np.random.default_rng(0))
    mask = np.arange(EXAMPLES) < 20
    monkeypatch.setattr(tf, "matmul", recording_matmul)  # that of Keras is this one, too
    gating(examples(), training=training, mask=mask)
    # Every example with the 32 groups, and the 20 that count with the 16 experts of their 3 groups.
    # In training that twice: for the noise too.
    once = EXAMPLES * WIDTH * 32 + 20 * 3 * WIDTH * 16
    assert sum(products) == once * (2 if training else 1)


def test_secondary_kernels_of_other_groups_are_never_met():
    layer, x = random_hierarchical(16, 4, HIDDEN, k=(2, 2), seed=3), examples()[:4]
    sound = layer(x)
    chosen = np.unique(numpy(layer.route(x).expert_index) // 4)
    assert len(chosen) <= 8
    poisoned = np.full((16, WIDTH, 4), np.nan)
    poisoned[chosen] = numpy(layer.gating.secondary)[chosen]
    layer.gating.secondary.assign(poisoned)

    def total(x):
        y = layer(x)
        return ops.sum(y) + sum(layer.losses), y

    np.testing.assert_array_equal(layer(x), sound)
    _, by_x, by_kernel = with_gradients(total, [x], [layer.gating.secondary])
    for gradient in (*by_x, *by_kernel):
        assert np.isfinite(gradient).all()


@pytest.mark.tensorflow("under JAX an activation sees a piece of rows at a time")
@pytest.mark.cpu
def test_load_of_evaluation_is_the_rows_that_each_expert_computes():
    rows_computed = []

    def recording_relu(z):
        rows_computed.append(len(z))
        return ops.relu(z)

    layer = random_hierarchical(5, 4, 8, k=(2, 3), activation=recording_relu)
    mask = np.arange(EXAMPLES) < 17
    layer(examples(), mask=mask)
    np.testing.assert_array_equal(layer.route(examples(), mask=mask).load, rows_computed)
    assert sum(rows_computed) == 17 * 2 * 3


def test_a_gate_too_small_for_float32_is_no_row():
    layer, x = random_hierarchical(3, 4, HIDDEN, k=(2, 2)), np.ones((4, WIDTH), "float32")
    # Margins of thousands: the second choice of the first level has the gate exp(-1000s) = 0.
    layer.gating.primary.assign(np.tile([-1000.0, 1000.0, 0.0], (WIDTH, 1)))
    routing = layer.route(x)
    np.testing.assert_allclose(np.sum(routing.gates, axis=1), np.ones(4), rtol=1e-6)
    assert set(numpy(routing.load)) == {0, 4} and np.sum(routing.load) == 4 * 2
    np.testing.assert_array_equal(numpy(routing.load)[:4], np.zeros(4))
    assert np.isfinite(layer(x)).all()


def test_gates_of_k_1_are_probabilities_that_learn():
    gating = HierarchicalGating(2, 3, k=(1, 1))
    gating.build((None, 1))
    gating.primary.assign(np.log([[1.0, 3.0]]))
    gating.secondary.assign(np.log([[[1.0, 1.0, 1.0]], [[1.0, 5.0, 4.0]]]))

    def first_gate(x):
        routing = gating(x)
        return routing.gates[0, 0], routing

    x, weights = np.ones((1, 1)), [gating.primary, gating.secondary]
    routing, _, (d_primary, d_secondary) = with_gradients(first_gate, [x], weights)
    gate = routing.gates[0, 0]
    np.testing.assert_array_equal(routing.expert_index, [[4]])  # 1·3 + 1
    np.testing.assert_allclose(gate, 3 / 4 * 1 / 2, rtol=1e-6)
    # Softmax: p_1·(1 - p_1) for itself, -p_1·p_j for the others; times the gate of the other level.
    np.testing.assert_allclose(d_primary, [[-3 / 16 / 2, 3 / 16 / 2]], rtol=1e-5)
    expected = np.array([[[0, 0, 0]], [[-0.05, 0.25, -0.2]]]) * 3 / 4
    np.testing.assert_allclose(d_secondary, expected, rtol=1e-5)


def test_ties_go_to_the_lowest_index():
    routing = HierarchicalMoE(4, 5, 3, k=(2, 3)).route(np.ones((2, WIDTH), "float32"))
    np.testing.assert_array_equal(routing.expert_index, [[0, 1, 2, 5, 6, 7]] * 2)
    np.testing.assert_allclose(routing.gates, np.full((2, 6), 1 / 6), rtol=1e-6)


def test_the_noise_repeats_with_the_seed_and_reaches_every_expert():
    x = np.ones((4096, WIDTH), "float32")
    first, again, other = (
        HierarchicalMoE(4, 4, 3, k=(1, 1), seed=seed).route(x, training=True) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.expert_index, again.expert_index)
    assert np.any(first.expert_index != other.expert_index)
    # Without signal each of the 16 experts has the chance 1/16: 256 examples, with a deviation of
    # √(4096 · 1/16 · 15/16) = 15.5. Were the levels to share their noise, 12 would have none.
    rows = np.bincount(numpy(first.expert_index).ravel(), minlength=16)
    np.testing.assert_allclose(rows, np.full(16, 256), atol=5 * 15.5)
    np.testing.assert_allclose(first.load, np.full(16, 256), rtol=0.1)


def test_kernels_begin_at_zero_and_have_the_documented_shapes():
    layer = HierarchicalMoE(3, 4, 8, output_dim=2)
    layer.build((None, 5))
    shapes = {name: tuple(getattr(layer.gating, name).shape) for name in KERNELS}
    assert shapes == {
        "primary": (5, 3),
        "secondary": (3, 5, 4),
        "primary_noise": (5, 3),
        "secondary_noise": (3, 5, 4),
    }
    assert not any(np.any(weight) for weight in layer.gating.trainable_weights)
    assert [tuple(kernel.shape) for kernel in layer.experts.kernels] == [(12, 5, 8), (12, 8, 2)]


def test_a_noise_epsilon_of_zero_is_refused():
    with pytest.raises(ValueError, match="above 0. Received: 0.0"):
        HierarchicalGating(3, 4, noise_epsilon=0.0)
