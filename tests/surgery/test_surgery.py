"""`grow`, `prune` and `used_experts`: trained layers with more experts, or fewer."""

import keras
import numpy as np
import pytest
from helpers import WIDTH
from trained_layers import (
    X,
    arrays,
    assert_same,
    assert_trains_saves_and_loads,
    run_example,
    trained,
)

import keras_moe
from keras_moe import HierarchicalMoE, NoisyTopKGating, SparseMoE


@pytest.mark.parametrize(
    ("layer", "num_experts", "k"),
    [
        (lambda: SparseMoE(6, 8, k=2, use_bias=True), 12, 4),
        (lambda: SparseMoE(3, (8, 5), k=3, output_dim=4), 6, 6),
        (lambda: SparseMoE(4, 8, gating="softmax"), 8, None),
        (lambda: SparseMoE(4, 8, gating=NoisyTopKGating(4, 2, noise=False)), 8, 4),
        (lambda: HierarchicalMoE(3, 2, 8, k=(2, 1)), 12, (4, 1)),
        (lambda: HierarchicalMoE(3, 2, 8, k=(2, 2), use_bias=True), 12, (4, 2)),
        (lambda: HierarchicalMoE(2, 2, 8, gating=NoisyTopKGating(4, 2)), 8, 4),
    ],
)
def test_twice_the_experts_and_twice_the_choices_compute_the_same(layer, num_experts, k):
    layer = trained(layer())
    before = arrays(layer)
    grown = keras_moe.grow(layer, num_experts, k=k)
    # An expert and its copy share what was the gate of one: exp / 2Σexp each.
    np.testing.assert_allclose(grown(X), layer(X), rtol=1e-5, atol=1e-5)
    assert grown.num_experts == num_experts
    assert type(grown) is type(layer)
    assert_same(arrays(layer), before)


def test_new_experts_are_copies_in_turn():
    layer = trained(SparseMoE(3, 8, k=2, use_bias=True))
    grown = keras_moe.grow(layer, 8)
    origins = [0, 1, 2, 0, 1, 2, 0, 1]
    for name in ("gate_kernel", "noise_kernel"):
        old, new = (np.asarray(getattr(each.gating, name).value) for each in (layer, grown))
        np.testing.assert_array_equal(new, old[:, origins])
    assert_same(arrays(grown.experts), [weight[origins] for weight in arrays(layer.experts)])


def test_new_groups_are_copies_in_turn():
    layer = trained(HierarchicalMoE(2, 3, 8, k=(1, 2)))
    grown = keras_moe.grow(layer, 9)
    assert (grown.num_groups, grown.experts_per_group, grown.k) == (3, 3, (1, 2))
    for name, axis in {
        "primary": 1,
        "primary_noise": 1,
        "secondary": 0,
        "secondary_noise": 0,
    }.items():
        old, new = (np.asarray(getattr(each.gating, name).value) for each in (layer, grown))
        np.testing.assert_array_equal(new, np.take(old, [0, 1, 0], axis=axis))
    leaves = [0, 1, 2, 3, 4, 5, 0, 1, 2]
    assert_same(arrays(grown.experts), [weight[leaves] for weight in arrays(layer.experts)])


def test_the_configuration_carries_over():
    layer = trained(
        SparseMoE(
            4,
            8,
            k=2,
            activation="gelu",
            use_bias=True,
            importance_loss_weight=0.3,
            load_loss_weight=0.2,
            kernel_regularizer="l2",
            seed=3,
            name="moe",
            dtype="mixed_bfloat16",
        )
    )
    for new in (keras_moe.grow(layer, 6), keras_moe.prune(layer, [3, 0])):
        expected = {**layer.get_config(), "num_experts": new.num_experts}
        assert new.get_config() == expected
        assert new.experts.dtype_policy.name == "mixed_bfloat16"
    own = trained(SparseMoE(4, 8, gating=NoisyTopKGating(4, 2, noise_epsilon=0.5, name="mine")))
    assert keras_moe.grow(own, 6).gating.get_config() == {
        **own.gating.get_config(),
        "num_experts": 6,
    }
    assert keras_moe.prune(own, [2, 1, 0], k=1).k == 1


@pytest.mark.parametrize(
    "layer", [lambda: SparseMoE(3, 8, k=2), lambda: HierarchicalMoE(3, 2, 8, k=(2, 1))]
)
def test_a_grown_layer_trains_saves_and_loads(layer, tmp_path):
    keras.utils.set_random_seed(0)
    layer = trained(layer())
    grown = keras_moe.grow(layer, 2 * layer.num_experts)
    assert_trains_saves_and_loads(grown, tmp_path)
    # The noise has told each expert from its copy.
    kernels = keras.ops.convert_to_numpy(grown.experts.kernels[0])
    difference = kernels[layer.num_experts :] - kernels[: layer.num_experts]
    assert np.all(np.abs(difference).max(axis=(1, 2)) > 1e-3)


@pytest.mark.parametrize(
    ("layer", "keep"),
    [
        (lambda: SparseMoE(6, 8, k=2, use_bias=True), [4, 0, 3, 1]),
        (lambda: SparseMoE(6, 8, gating=NoisyTopKGating(6, 2)), np.array([4, 0, 3, 1])),
    ],
)
def test_experts_never_chosen_can_go(layer, keep):
    layer = trained(layer())
    # Positive inputs and columns of -9: experts 2 and 5 come last for every example.
    x = np.abs(X)
    gate_kernel = arrays(layer.gating)[0].copy()
    gate_kernel[:, [2, 5]] = -9
    layer.gating.gate_kernel.assign(gate_kernel)
    assert set(np.unique(layer.route(x).expert_index)) == {0, 1, 3, 4}
    before = arrays(layer)
    pruned = keras_moe.prune(layer, keep)
    np.testing.assert_allclose(pruned(x), layer(x), rtol=1e-6, atol=1e-6)
    # Expert i of the new layer is expert keep[i] of the old one.
    chosen = np.asarray(pruned.route(x).expert_index)
    np.testing.assert_array_equal(np.asarray(keep)[chosen], layer.route(x).expert_index)
    assert_same(arrays(layer), before)


def test_used_experts_are_those_with_more_than_a_share_of_the_even_load():
    layer = trained(SparseMoE(4, 8, k=1, name="moe"))
    # Each example goes to the expert of its largest feature: 6, 3, 1 and 0 of 10.
    layer.gating.gate_kernel.assign(np.eye(WIDTH, 4))
    x = np.eye(WIDTH, dtype="float32")[[0] * 6 + [1] * 3 + [2]]
    model = keras.Sequential([keras.Input((WIDTH,)), layer])
    # The even share is 2.5.
    for min_share, expected in ((0, [0, 1, 2]), (0.4, [0, 1]), (0.5, [0, 1]), (1.3, [0])):
        for data in (x, [x[:5], (x[5:], np.zeros(5))]):
            used = keras_moe.used_experts(model, data, min_share)
            assert list(used) == ["moe"] and used["moe"].tolist() == expected
    pruned = keras_moe.prune(layer, keras_moe.used_experts(model, x)["moe"])
    assert pruned.num_experts == 3
    for arguments, message in (((x, -1), "min_share"), ((iter([x]),), "read once")):
        with pytest.raises(ValueError, match=message):
            keras_moe.used_experts(model, *arguments)


def test_a_group_is_used_by_any_of_its_experts():
    layer = trained(HierarchicalMoE(3, 2, 8, k=(1, 1), name="moe"))
    layer.gating.primary.assign(np.eye(WIDTH, 3))
    model = keras.Sequential([keras.Input((WIDTH,)), layer])
    x = np.eye(WIDTH, dtype="float32")[[0, 2, 2]]
    assert keras_moe.used_experts(model, x)["moe"].tolist() == [0, 2]


def test_groups_never_chosen_can_go():
    layer = trained(HierarchicalMoE(4, 2, 8, k=(2, 1)))
    x = np.abs(X)
    primary = arrays(layer.gating)[0].copy()
    primary[:, 1] = -9
    layer.gating.primary.assign(primary)
    pruned = keras_moe.prune(layer, [3, 2, 0])
    assert (pruned.num_groups, pruned.num_experts) == (3, 6)
    np.testing.assert_allclose(pruned(x), layer(x), rtol=1e-6, atol=1e-6)


def test_a_pruned_layer_trains_saves_and_loads(tmp_path):
    layer = trained(SparseMoE(6, 8, k=2))
    assert_trains_saves_and_loads(keras_moe.prune(layer, [5, 1, 2]), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: keras_moe.grow(layer, 4), "above that of the layer.*num_experts=4.*with 4"),
        (lambda layer: keras_moe.grow(layer, 0), "at least 1. Received: 0"),
        (lambda layer: keras_moe.grow(layer, 8, k=9), "choose 9 of 8.*k=9"),
        (lambda layer: keras_moe.prune(layer, [0, 1, 4]), r"from 0 to 3.*keep=\[0, 1, 4\]"),
        (lambda layer: keras_moe.prune(layer, [-1, 1]), r"from 0 to 3.*keep=\[-1, 1\]"),
        (lambda layer: keras_moe.prune(layer, [0, 1, 1]), "each once"),
        (lambda layer: keras_moe.prune(layer, []), "at least one"),
        (lambda layer: keras_moe.prune(layer, 2), "must list experts.*keep=2"),
        (lambda layer: keras_moe.prune(layer, [0.5, 1]), "integers"),
        (lambda layer: keras_moe.prune(layer, [1, 3]), "choose 3 of 2.*smaller `k`.*k=3"),
        (lambda layer: keras_moe.grow(layer.experts, 8), "must be a SparseMoE.*FeedForwardExperts"),
        (lambda layer: keras_moe.grow(SparseMoE(4, 8), 8), "build 'sparse_moe.*' first"),
    ],
)
def test_changes_that_cannot_be_made_say_why(change, message):
    with pytest.raises(ValueError, match=message):
        change(trained(SparseMoE(4, 8, k=3)))


def test_groups_grow_and_go_as_a_whole():
    layer = trained(HierarchicalMoE(3, 2, 8, k=(2, 1)))
    with pytest.raises(ValueError, match="multiple of `experts_per_group=2`.*num_experts=9"):
        keras_moe.grow(layer, 9)
    with pytest.raises(ValueError, match=r"choose 2 of 1.*k=\(2, 1\)"):
        keras_moe.prune(layer, [2])
    assert keras_moe.prune(layer, [2], k=(1, 1)).k == (1, 1)


def test_a_gating_without_k_is_given_none():
    with pytest.raises(ValueError, match="no `k`.*k=2"):
        keras_moe.grow(trained(SparseMoE(4, 8, gating="softmax")), 8, k=2)


@pytest.mark.parametrize("functional", [False, True])
def test_the_examples_of_grow_and_prune_run(functional):
    layer = trained(SparseMoE(10, 4, k=2, name="moe"))
    model = keras.Sequential([keras.Input((WIDTH,)), layer, keras.layers.Dense(2)])
    if functional:
        inputs = keras.Input((WIDTH,))
        model = keras.Model(inputs, keras.layers.Dense(2)(inputs + layer(inputs)))
    grown = run_example(keras_moe.grow, model)
    assert (grown.get_layer("moe").num_experts, grown.get_layer("moe").k) == (20, 4)
    np.testing.assert_allclose(grown(X), model(X), rtol=1e-5, atol=1e-5)
    layer.gating.gate_kernel.assign(np.eye(WIDTH, 10))  # Those without a feature win no example.
    pruned = run_example(keras_moe.prune, model)
    used = np.unique(layer.route(X).expert_index)
    assert pruned.get_layer("moe").num_experts == len(used) < 10
    np.testing.assert_allclose(pruned(X), model(X), rtol=1e-5, atol=1e-5)
    assert pruned.layers[-1] is model.layers[-1]
    assert pruned(X).shape == (50, 2)
