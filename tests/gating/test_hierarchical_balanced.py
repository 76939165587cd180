"""Strictly balanced gating at two levels: its numbers against the oracle, and that it learns."""

import keras
import numpy as np
import pytest
from helpers import (
    assert_agrees,
    assign_random_weights,
    examples,
    language_model,
    next_words,
    random_hierarchical,
    with_random_weights,
)
from keras.ops import convert_to_numpy as numpy

from keras_moe import HierarchicalBalancedGating, HierarchicalMoE, grow

pytestmark = pytest.mark.covering


def random_layer(num_groups=3, group_size=4, k=(2, 2), **options):
    gating_options = {
        name: options.pop(name)
        for name in ("static_shapes", "router_z_loss_weight", "batchwise_loss_weight")
        if name in options
    }
    gating = HierarchicalBalancedGating(num_groups, group_size, k, **gating_options)
    layer = with_random_weights(
        HierarchicalMoE(num_groups, group_size, 4, gating=gating, **options)
    )
    rng = np.random.default_rng(3)
    for weight in (gating.primary, gating.secondary):
        weight.assign(0.5 * rng.normal(size=weight.shape))
    for weight in (gating.primary_thresholds, gating.secondary_thresholds):
        weight.assign(rng.uniform(0.1, 0.5, size=weight.shape))
    return layer


def mask_of(number):
    return np.random.default_rng(2).random(number) < 0.7


@pytest.mark.parametrize("static_shapes", [False, True])
@pytest.mark.parametrize(
    ("num_groups", "group_size", "k", "number", "masked"),
    [
        (3, 4, (2, 2), 23, False),  # groups keep ceil(46/3) = 16, experts ceil(32/4) = 8
        (3, 4, (2, 2), 23, True),
        (5, 2, (1, 1), 3, False),  # fewer examples than groups
        (2, 3, (2, 3), 7, True),  # every expert takes every example
    ],
)
def test_training_agrees_with_the_oracle(num_groups, group_size, k, number, masked, static_shapes):
    layer = random_layer(num_groups, group_size, k, static_shapes=static_shapes)
    mask = mask_of(number) if masked else None
    expected = assert_agrees(layer, examples(number), training=True, mask=mask)
    counted = mask.sum() if masked else number
    kept = -(-k[0] * counted // num_groups)
    np.testing.assert_array_equal(
        expected.load, np.full_like(expected.load, -(-k[1] * kept // group_size))
    )


@pytest.mark.parametrize(("masked", "way"), [(False, "eager"), (True, "graph, any batch")])
def test_inference_agrees_with_the_oracle(masked, way):
    layer = random_layer()
    layer.gating.primary_thresholds.assign([0.45, 0.5, 0.5])
    layer.gating.secondary_thresholds.assign(np.tile([0.1, 0.1, 0.2, 0.3], (3, 1)))
    mask = mask_of(24) if masked else None
    expected = assert_agrees(layer, examples(), training=False, mask=mask, way=way)
    chosen = np.count_nonzero(expected.dense_gates.reshape(24, -1), axis=1)
    chosen = chosen[mask] if masked else chosen
    assert 0 in chosen and chosen.max() >= 3  # examples without any expert, and with many


def test_all_losses_and_more_than_64_groups_agree_with_the_oracle():
    layer = random_layer(65, 2, router_z_loss_weight=0.1, batchwise_loss_weight=0.5)
    assert_agrees(layer, examples(12), training=True)


def test_an_answer_does_not_depend_on_the_neighbours():
    layer, x = random_layer(), examples()[:8]
    alone = [layer(row[None], training=False)[0] for row in x]
    np.testing.assert_allclose(layer(x, training=False), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_a_broken_example_stays_in_its_own_row(training):
    layer, x = random_layer(), examples()
    sound = layer(np.delete(x, 3, axis=0), training=training)
    x[3, 2] = np.nan
    y = numpy(layer(x, training=training))
    np.testing.assert_allclose(np.delete(y, 3, axis=0), sound, rtol=1e-5, atol=1e-6)
    assert np.isfinite([float(loss) for loss in layer.losses]).all()


def test_thresholds_learn_what_training_chooses():
    layer, x = random_layer(2, 2, (1, 1)), examples(64)
    gating = layer.gating
    inputs = keras.Input(x.shape[1:])
    model = keras.Model(inputs, gating(inputs).load)
    rate = keras.optimizers.schedules.InverseTimeDecay(0.002, 20, 1.0)
    for kernel in (gating.primary, gating.secondary):
        kernel.trainable = False
    model.compile(keras.optimizers.SGD(rate))
    model.fit(x, batch_size=64, epochs=100, verbose=0)
    chosen = gating(x, training=True)
    np.testing.assert_array_equal(chosen.load, np.full(4, 16))  # 64 rows, 32 a group, 16 an expert
    np.testing.assert_allclose(gating(x, training=False).load, chosen.load, atol=2)


def test_a_layer_that_asks_for_it_by_name_comes_back(tmp_path):
    moe = HierarchicalMoE(2, 2, 16, k=(1, 1), gating="strictly_balanced")
    model, (x, _) = language_model(moe=moe), next_words()
    model.build(x.shape)
    assign_random_weights(moe, np.random.default_rng(0), 0.5)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(x), model(x))
    assert loaded.layers[1].get_config() == moe.get_config()


def test_groups_can_be_added():
    layer = random_layer()
    grown = grow(layer, 24)
    np.testing.assert_array_equal(
        numpy(grown.gating.secondary_thresholds)[:3], layer.gating.secondary_thresholds
    )
    assert grown.gating.secondary.shape == (6, 6, 4)


def test_config_round_trip():
    gating = HierarchicalBalancedGating(
        3, 2, (2, 1), 0.5, static_shapes=True, router_z_loss_weight=0.1
    )
    config = gating.get_config()
    assert HierarchicalBalancedGating.from_config(config).get_config() == config
    assert (config["batchwise_loss_weight"], config["k"]) == (0.5, (2, 1))


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="k=\\(3, 1\\), num_groups=2"):
        HierarchicalBalancedGating(2, 2, (3, 1))
    with pytest.raises(ValueError, match='`gating` must be "noisy_top_k", "strictly_balanced"'):
        random_hierarchical(2, 2, 4, gating="softmax")
    with pytest.raises(ValueError, match="expert_parallel"):
        HierarchicalMoE(2, 2, 4, gating="strictly_balanced", expert_parallel=True)
