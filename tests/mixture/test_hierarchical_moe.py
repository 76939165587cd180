"""HierarchicalMoE: its numbers against the oracle."""

import keras
import numpy as np
import pytest
from helpers import EXAMPLES, WIDTH, assert_agrees, examples, random_hierarchical
from inputs import policies
from keras import ops
from keras.ops import convert_to_numpy as numpy

from keras_moe import HierarchicalGating, HierarchicalMoE, Routing, SparseMoE

pytestmark = pytest.mark.covering

HIDDEN = 5


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("groups", "group_size", "k"),
    [
        (1, 1, (1, 1)),
        (1, 5, (1, 2)),
        (5, 1, (2, 1)),
        (2, 3, (1, 1)),
        (3, 4, (2, 2)),
        (3, 4, (1, 3)),
        (3, 4, (3, 2)),  # every group: the load of the first level is counted
        (3, 4, (2, 4)),  # every expert of a group: that of the second level
        (3, 4, (3, 4)),
        (8, 8, (2, 2)),
        (40, 2, (1, 1)),  # more groups than examples
    ],
)
def test_agrees_with_the_oracle(groups, group_size, k, training):
    layer = random_hierarchical(groups, group_size, HIDDEN, k=k, output_dim=4, seed=7)
    expected = assert_agrees(layer, examples(), training=training)
    if groups > EXAMPLES:
        assert not expected.load.any(axis=1).all()


@pytest.mark.parametrize("k", [(2, 2), (1, 1)])
def test_without_noise_agrees_with_the_oracle(k):
    layer = random_hierarchical(3, 4, HIDDEN, gating=HierarchicalGating(3, 4, k, noise=False))
    assert len(layer.gating.weights) == 2
    assert_agrees(layer, examples(), training=True)


@pytest.mark.parametrize("training", [True, False])
def test_biases_deep_experts_and_a_mask_agree_with_the_oracle(training):
    layer = random_hierarchical(3, 4, [5, 4], use_bias=True, activation="tanh", seed=11)
    mask = np.random.default_rng(2).random(EXAMPLES) < 0.6
    assert_agrees(layer, examples(), training=training, mask=mask)


@pytest.mark.parametrize("training", [True, False])
def test_uneven_and_empty_groups_agree_with_the_oracle(training):
    layer = random_hierarchical(4, 3, HIDDEN, k=(2, 2), seed=5)
    x = examples()
    x[:, 0] = 1.0
    # This feature keeps every example away from group 0, and pulls most to group 2.
    primary = numpy(layer.gating.primary).copy()
    primary[0] = [-40.0, 0.0, 3.0, 1.0]
    layer.gating.primary.assign(primary)
    expected = assert_agrees(layer, x, training=training)
    group = expected.expert_index[:, ::2] // 3
    rows_per_group = np.bincount(group.ravel(), minlength=4)
    assert rows_per_group[0] == 0
    assert 0 < rows_per_group[1] < rows_per_group[3] < rows_per_group[2]
    np.testing.assert_array_equal(expected.load[0], np.zeros(3))


@pytest.mark.parametrize("training", [True, False])
def test_z_loss_of_both_levels_agrees_with_the_oracle(training):
    layer = random_hierarchical(4, 3, HIDDEN, k=(2, 2), router_z_loss_weight=0.2, seed=5)
    mask = np.arange(EXAMPLES) % 3 > 0
    expected = assert_agrees(layer, examples(), training=training, mask=mask)
    layer(examples(), training=training, mask=mask)
    # Behind importance and load: that of the groups, then that within the groups.
    _, _, primary, secondary = layer.losses
    logits = examples()[mask] @ numpy(layer.gating.primary)
    wanted = 0.2 * np.mean(np.logaddexp.reduce(logits, axis=-1) ** 2)
    np.testing.assert_allclose(primary, wanted, rtol=1e-5)
    np.testing.assert_allclose(primary + secondary, expected.router_z_loss, rtol=1e-5)
    assert secondary > 0.01


class FixedGating(keras.layers.Layer):
    """A flat gating over all experts, whose gates were worked out beforehand."""

    def __init__(self, gates):
        super().__init__()
        self.gates = gates

    def call(self, x, training=None, mask=None):
        everyone = np.broadcast_to(np.arange(self.gates.shape[1], dtype="int32"), self.gates.shape)
        importance = ops.sum(ops.convert_to_tensor(self.gates, "float32"), axis=0)
        gates = ops.convert_to_tensor(self.gates, "float32")
        return Routing(ops.convert_to_tensor(everyone), gates, importance, importance)


def softmax_of_top(logits, k):
    """Noiseless gates [..., N] of equations 3 to 5, for k > 1."""
    kept = np.where(logits >= np.sort(logits)[..., -k, None], logits, -np.inf)
    weights = np.exp(kept - kept.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def test_equals_the_flat_mixture_whose_gates_are_the_products():
    layer, x = random_hierarchical(4, 5, HIDDEN, k=(2, 3)), examples()
    primary = softmax_of_top(x @ numpy(layer.gating.primary), 2)
    secondary = softmax_of_top(np.einsum("td,adb->tab", x, numpy(layer.gating.secondary)), 3)
    products = np.reshape(primary[:, :, None] * secondary, (EXAMPLES, 20))
    assert (np.count_nonzero(products, axis=1) == 6).all()
    flat = SparseMoE(20, HIDDEN, gating=FixedGating(products))
    flat.build(x.shape)
    flat.experts.set_weights(layer.experts.get_weights())
    np.testing.assert_allclose(layer(x), flat(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layer.losses[0], flat.losses[0], rtol=1e-5)


@pytest.mark.parametrize("groups", [1, 7])
def test_one_group_or_groups_of_one_equal_the_flat_layer(groups):
    sizes, k = ((1, 7), (1, 3)) if groups == 1 else ((7, 1), (3, 1))
    layer, x = random_hierarchical(*sizes, HIDDEN, k=k), examples()
    flat = SparseMoE(7, HIDDEN, k=3)
    flat.build(x.shape)
    kernel = layer.gating.secondary[0] if groups == 1 else layer.gating.primary
    flat.gating.gate_kernel.assign(kernel)
    flat.experts.set_weights(layer.experts.get_weights())
    # The only choice of a level has the gate 1.
    np.testing.assert_allclose(layer(x), flat(x), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(layer.route(x), flat.route(x), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", policies("mixed_float16", "mixed_bfloat16", "float64"))
def test_gating_is_float32_under_every_policy(policy):
    layer = HierarchicalMoE(3, 4, 8, dtype=policy)
    y = layer(np.ones((2, 3, WIDTH)), training=True)
    assert y.dtype == keras.DTypePolicy(policy).compute_dtype
    assert {w.dtype for w in layer.gating.trainable_weights} == {"float32"}
    assert layer.route(np.ones((2, 3, WIDTH))).gates.dtype == "float32"
