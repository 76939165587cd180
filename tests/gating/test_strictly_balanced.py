"""Strictly balanced gating (appendix F): its numbers against the oracle, and that it learns."""

import keras
import numpy as np
import pytest
from helpers import (
    CROSS_ENTROPY,
    WIDTH,
    assert_agrees,
    examples,
    language_model,
    next_words,
    run,
    with_random_weights,
)
from keras.ops import convert_to_numpy as numpy

from keras_moe import SparseMoE, StrictlyBalancedGating

pytestmark = pytest.mark.covering


def random_layer(num_experts=5, k=2, static_shapes=False, weight=1.0, z=0.0, **kwargs):
    gating = StrictlyBalancedGating(
        num_experts, k, weight, static_shapes=static_shapes, router_z_loss_weight=z
    )
    layer = with_random_weights(SparseMoE(num_experts, 4, gating=gating, **kwargs))
    rng = np.random.default_rng(3)
    gating.gate_kernel.assign(0.5 * rng.normal(size=gating.gate_kernel.shape))
    gating.thresholds.assign(rng.uniform(0.1, 0.5, size=num_experts))
    return layer


def mask_of(number):
    return np.random.default_rng(2).random(number) < 0.7


@pytest.mark.parametrize("static_shapes", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("num_experts", "k", "number"),
    [
        (5, 2, 23),  # 46/5: m = 10
        (4, 3, 8),  # m = 6 exactly
        (6, 1, 3),  # fewer examples than experts, m = 1
        (3, 3, 7),  # every expert takes every example
        (1, 1, 4),
    ],
)
def test_training_agrees_with_the_oracle(num_experts, k, number, masked, static_shapes):
    layer = random_layer(num_experts, k, static_shapes)
    mask = mask_of(number) if masked else None
    expected = assert_agrees(layer, examples(number), training=True, mask=mask)
    counted = mask.sum() if masked else number
    most = -(-k * counted // num_experts)
    np.testing.assert_array_equal(expected.load, np.full(num_experts, most))


@pytest.mark.parametrize("static_shapes", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_inference_agrees_with_the_oracle(masked, static_shapes):
    layer = random_layer(static_shapes=static_shapes)
    layer.gating.thresholds.assign([0.7, 0.1, 0.1, 0.1, 0.7])
    mask = mask_of(24) if masked else None
    expected = assert_agrees(layer, examples(), training=False, mask=mask)
    chosen = np.count_nonzero(expected.dense_gates[mask if masked else slice(None)], axis=1)
    assert 0 in chosen and chosen.max() >= 3  # examples without any expert, and with many


def test_training_leaves_out_examples_and_gives_others_to_many():
    expected = assert_agrees(random_layer(k=1), examples(), training=True)
    chosen = np.count_nonzero(expected.dense_gates, axis=1)
    assert 0 in chosen and chosen.max() >= 2


@pytest.mark.parametrize("static_shapes", [False, True])
def test_of_equal_scores_the_earlier_examples_are_kept(static_shapes):
    # Zero kernels, all scores 1/2. Of rows 1 to 3 both experts keep the first ceil(1 · 3 / 2) = 2.
    gating = StrictlyBalancedGating(2, k=1, static_shapes=static_shapes)
    x, mask = np.ones((4, WIDTH), "float32"), np.array([False, True, True, True])
    routing = gating(x, training=True, mask=mask)
    np.testing.assert_array_equal(routing.gates, [[0, 0], [0.5, 0.5], [0.5, 0.5], [0, 0]])
    np.testing.assert_array_equal(numpy(routing.expert_index)[1:3], [[0, 1]] * 2)
    np.testing.assert_array_equal(routing.load, [2, 2])
    # The thresholds are 0, which cut off nothing: row 3 is above and not kept, 1/2 - 0 for each
    # of two experts.
    np.testing.assert_allclose(gating.losses, [1.0])
    # At inference nothing is cut off either.
    inference = gating(x, training=False, mask=mask)
    np.testing.assert_array_equal(inference.gates, mask[:, None] * [[0.5, 0.5]])


@pytest.mark.parametrize("training", [True, False])
def test_an_unknown_number_of_choices_agrees_with_the_oracle(training):
    layer = random_layer(num_shared_experts=2, use_bias=True)
    assert_agrees(layer, examples(), training=training, mask=mask_of(24), way="graph, any batch")


@pytest.mark.parametrize("static_shapes", [False, True])
@pytest.mark.parametrize("factor", [0.3, 1.0, 9.0])
def test_capacity_agrees_with_the_oracle(factor, static_shapes):
    layer = random_layer(static_shapes=static_shapes, capacity_factor=factor)
    expected = assert_agrees(layer, examples(), training=True, mask=mask_of(24))
    # As every expert takes ceil(k·|X| / N) examples, a factor of 1 drops nothing.
    assert (expected.fraction_dropped > 0.5) == (factor == 0.3)
    assert (expected.fraction_dropped == 0.0) == (factor != 0.3)


def test_losses_are_importance_load_z_and_then_batchwise():
    layer = random_layer(z=0.1, weight=0.5)
    expected = assert_agrees(layer, examples(), training=True)
    layer(examples(), training=True)
    wanted = [
        expected.importance_loss,
        expected.load_loss,
        expected.router_z_loss,
        expected.batchwise_loss,
    ]
    assert min(wanted[0], *wanted[2:]) > 0.01 and wanted[1] == 0.0
    np.testing.assert_allclose(layer.losses, wanted, rtol=1e-5, atol=1e-6)
    layer(examples(), training=False)
    assert len(layer.losses) == 3  # The thresholds learn in training alone.


@pytest.mark.parametrize("static_shapes", [False, True])
def test_an_answer_does_not_depend_on_the_neighbours(static_shapes):
    layer, x = random_layer(static_shapes=static_shapes), examples()
    alone = [layer(row[None], training=False)[0] for row in x]
    np.testing.assert_allclose(layer(x, training=False), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_example_stays_in_its_own_row(value, training):
    layer, x = random_layer(), examples()
    sound = layer(np.delete(x, 3, axis=0), training=training)
    x[3, 2] = value
    received = run(layer, x, np.ones_like(x), training=training)
    # Nobody chooses it, and it doesn't count: the others get what they get without it.
    np.testing.assert_allclose(np.delete(received["y"], 3, axis=0), sound, rtol=1e-5, atol=1e-6)
    assert np.isfinite(received["losses"]).all()


def test_thresholds_learn_what_training_chooses():
    keras.utils.set_random_seed(0)  # `language_model` does so too late for these experts.
    gating = StrictlyBalancedGating(4, k=1)
    model, (x, y) = language_model(moe=SparseMoE(4, 16, gating=gating)), next_words()

    def share_of_each_expert():
        routing = model.layers[1].route(model.layers[0](x), mask=x > 0)
        return numpy(routing.load) / np.sum(x > 0)

    model.build(x.shape)
    np.testing.assert_array_equal(share_of_each_expert(), np.ones(4))
    model.compile(keras.optimizers.Adam(0.01), CROSS_ENTROPY)
    model.fit(x, y, epochs=40, verbose=0)
    np.testing.assert_allclose(share_of_each_expert(), np.full(4, 1 / 4), atol=0.05)


def test_saved_model_comes_back(tmp_path):
    model, (x, y) = language_model(gating="strictly_balanced"), next_words()
    model.compile(keras.optimizers.Adam(0.03), CROSS_ENTROPY)
    model.fit(x, y, epochs=2, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert np.any(loaded.layers[1].gating.thresholds)
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


def test_config_round_trip():
    gating = StrictlyBalancedGating(6, 3, 0.5, static_shapes=True, router_z_loss_weight=0.1)
    config = gating.get_config()
    wanted = {"num_experts": 6, "k": 3, "batchwise_loss_weight": 0.5, "static_shapes": True}
    assert {**wanted, "router_z_loss_weight": 0.1}.items() <= config.items()
    assert StrictlyBalancedGating.from_config(config).get_config() == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 4}, "k=4, num_experts=3"),
        ({"k": 0}, "k=0, num_experts=3"),
        ({"k": 1, "batchwise_loss_weight": -1}, "`batchwise_loss_weight` .*Received: -1"),
        ({"k": 1, "dtype": "float64"}, "float32 whatever"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        StrictlyBalancedGating(3, **arguments)
