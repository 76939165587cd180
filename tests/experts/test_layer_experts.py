"""Experts that are clones of any Keras layer."""

import keras
import numpy as np
import pytest
from gradients import with_gradients
from helpers import (
    CROSS_ENTROPY,
    WIDTH,
    assign_random_weights,
    examples,
    language_model,
    next_words,
    with_random_weights,
)
from keras import ops
from keras.ops import convert_to_numpy as numpy
from keras.src.saving.serialization_lib import ObjectSharingScope

import keras_moe
from keras_moe import LayerExperts, NoisyTopKGating, SparseMoE

HIDDEN = 4
# Of experts whose losses or statistics are means over their rows. Under JAX those need a capacity:
# `test_experts_that_count_their_rows_are_refused`.
FACTORS = [1.0] if keras.config.backend() == "jax" else [None, 1.0]


def sequential(**kwargs):
    return keras.Sequential(
        [keras.layers.Dense(HIDDEN, "relu", **kwargs), keras.layers.Dense(3)], name="expert"
    )


def functional(width=WIDTH):
    inputs = keras.Input((width,))
    hidden = keras.layers.Dense(width, "tanh")(inputs)
    hidden = keras.layers.BatchNormalization()(hidden)
    outputs = inputs + keras.layers.Dropout(0.5, seed=3)(hidden)
    return keras.Model(inputs, outputs, name="expert")


def step(layer, x, *, training=True, mask=None):
    """Output, losses, and gradients by x, the gating's weights and each expert's weights."""

    def total(x):
        y = layer(x, training=training, mask=mask)
        losses = list(layer.losses)
        return ops.sum(ops.sin(y)) + sum(losses), {"y": y, "losses": losses}

    total.layer = layer
    parts = [layer.gating, *experts_of(layer)]
    weights = [weight for part in parts for weight in part.trainable_weights]
    results, by_x, by_weights = with_gradients(total, [x], weights)
    found = iter(by_weights)
    d_gating, *d_experts = ([next(found) for _ in part.trainable_weights] for part in parts)
    return results["y"], results["losses"], [*by_x, *d_gating], d_experts


def experts_of(layer):
    return layer.experts.layers if isinstance(layer.experts, LayerExperts) else [layer.experts]


@pytest.mark.parametrize("factor", [None, 0.5])
def test_equals_feed_forward_experts(factor):
    options = {"gating": NoisyTopKGating(5, k=2, noise=False), "num_shared_experts": 2}
    options["capacity_factor"] = factor
    bank = SparseMoE(5, HIDDEN, output_dim=3, use_bias=True, **options)
    layers = SparseMoE(5, experts=sequential(), **options)
    for layer in (bank, layers):
        layer.build((None, WIDTH))
    assign_random_weights(bank, np.random.default_rng(0))
    layers.gating.set_weights(bank.gating.get_weights())
    pairs = [(layers.experts, bank.experts), (layers.shared_experts, bank.shared_experts)]
    for ours, theirs in pairs:
        for i, expert in enumerate(ours.layers):
            expert.set_weights([weight[i] for weight in theirs.get_weights()])
    mask = np.arange(24) % 5 > 0
    y, losses, gradients, d_experts = step(layers, examples(), mask=mask)
    y_bank, losses_bank, gradients_bank, [d_bank] = step(bank, examples(), mask=mask)
    np.testing.assert_allclose(y, y_bank, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(losses, losses_bank, rtol=1e-6)
    for our, their in zip(gradients, gradients_bank, strict=True):
        np.testing.assert_allclose(our, their, rtol=1e-4, atol=1e-4)
    for i, gradient in enumerate(d_experts):
        for our, their in zip(gradient, d_bank, strict=True):
            np.testing.assert_allclose(our, their[i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", [None, 7])
def test_clones_are_drawn_anew(seed):
    initializer = keras.initializers.GlorotUniform(seed=seed)
    template = sequential(kernel_initializer=initializer)
    template.build((None, WIDTH))
    bank = LayerExperts(4, template)
    bank.build((None, WIDTH))
    kernels = [numpy(layer.layers[0].kernel) for layer in (template, *bank.layers)]
    for i in range(5):
        for j in range(i):
            assert np.abs(kernels[i] - kernels[j]).max() > 0.1
    assert len({layer.name for layer in bank.layers}) == 4
    if seed is not None:
        again = LayerExperts(4, sequential(kernel_initializer=initializer))
        again.build((None, WIDTH))
        np.testing.assert_array_equal(again.layers[2].layers[0].kernel, kernels[3])


def activity_is_summed():
    """Whether Keras adds up activity losses of rows, as 3.10 to 3.12 do, or takes their mean."""
    dense = keras.layers.Dense(1, kernel_initializer="ones", activity_regularizer="l1")
    dense(np.ones((2, 1), "float32"))
    return np.isclose(dense.losses[0], 0.02)


@pytest.mark.parametrize("factor", FACTORS)
def test_losses_of_the_experts_are_losses_of_the_layer(factor):
    expert = keras.layers.Dense(
        3, kernel_regularizer=keras.regularizers.L2(0.5), activity_regularizer="l1"
    )
    layer = SparseMoE(4, experts=expert, k=1, capacity_factor=factor, name="moe")
    layer.build((None, WIDTH))
    assign_random_weights(layer, np.random.default_rng(0))
    # Large margins: row t goes to expert t % 3 whatever the noise, and none to expert 3.
    layer.gating.gate_kernel.assign(1e3 * np.eye(WIDTH, 4))
    x = np.eye(3, WIDTH, dtype="float32")[np.arange(9) % 3]
    layer(x, training=True)
    importance_and_load, others = layer.losses[:2], layer.losses[2:]
    # All gates are 1, so CV² of [3, 3, 3, 0] twice: variance 27/16 over the squared mean 81/16.
    np.testing.assert_allclose(importance_and_load, [0.1 / 3, 0.1 / 3], rtol=1e-5)
    kernels = np.stack([numpy(expert.kernel) for expert in layer.experts.layers])
    biases = np.stack([numpy(expert.bias) for expert in layer.experts.layers])
    # L1 with its default of 0.01, by Keras a mean over the rows, up to 3.12 their sum. Without a
    # capacity those are 3 equal ones, or one of zeros for expert 3; with one, C = ceil(9/4) = 3
    # places.
    outputs = np.append(kernels[[0, 1, 2], [0, 1, 2]], np.zeros((1, 3)), axis=0) + biases
    activity = 0.01 * np.abs(outputs).sum(axis=1)
    if activity_is_summed():
        activity *= [3, 3, 3, 3 if factor else 1]
    np.testing.assert_allclose(np.sort(others[:4]), np.sort(activity), rtol=1e-5)
    decay = 0.5 * np.square(kernels).sum(axis=(1, 2))
    np.testing.assert_allclose(np.sort(others[4:]), np.sort(decay), rtol=1e-5)


@pytest.mark.parametrize("factor", FACTORS)
def test_models_with_dropout_and_batch_normalization(factor):
    layer = with_random_weights(SparseMoE(5, experts=functional(), k=2, capacity_factor=factor))
    for expert in layer.experts.layers:
        expert.layers[2].moving_variance.assign(np.ones(WIDTH))
    x = examples()
    # No example goes to expert 4.
    x[:, 0] = 1.0
    kernel = numpy(layer.gating.gate_kernel).copy()
    kernel[0] = [0, 0, 0, 0, -1e3]
    layer.gating.gate_kernel.assign(kernel)
    assert layer.route(x).load[4] == 0
    still = layer(x, training=False)
    np.testing.assert_array_equal(layer(x, training=False), still)
    before = [numpy(expert.layers[2].moving_mean) for expert in layer.experts.layers]
    y, _, gradients, d_experts = step(layer, x)
    for value in keras.tree.flatten([y, gradients, d_experts, layer.weights]):
        assert np.isfinite(value).all()
    moved = [
        not np.array_equal(expert.layers[2].moving_mean, mean)
        for expert, mean in zip(layer.experts.layers, before, strict=True)
    ]
    assert all(moved[:4])
    assert np.any(layer(x, training=True) != y)  # Dropout
    # Each expert drops its own: the same seed for all would drop alike.
    seeds = {expert.layers[3].get_config()["seed"] for expert in layer.experts.layers}
    assert len(seeds) == 5 and all(expert.trainable_weights for expert in layer.experts.layers)


def test_fit_saves_and_loads(tmp_path):
    factor = None if None in FACTORS else 2.0
    layer = SparseMoE(4, experts=functional(8), k=2, num_shared_experts=1, capacity_factor=factor)
    model, (x, y) = language_model(moe=layer), next_words()
    model.compile(keras.optimizers.Adam(0.03), CROSS_ENTROPY)
    history = model.fit(x, y, batch_size=16, epochs=8, verbose=0).history
    assert history["loss"][-1] < 0.8 * history["loss"][0]
    expected = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), expected)
    model.save_weights(tmp_path / "model.weights.h5")
    clone = keras.models.clone_model(model)
    clone.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(clone.predict(x, verbose=0), expected)


@pytest.mark.parametrize("expert", [sequential, functional])
def test_config_round_trip(expert):
    layer = SparseMoE(3, experts=LayerExperts(3, expert()), k=2, num_shared_experts=1)
    y, config = layer(examples()), layer.get_config()
    SparseMoE.from_config(config)  # after which it is still whole
    clone = SparseMoE.from_config(config)
    clone.build((None, WIDTH))
    clone.set_weights(layer.get_weights())
    np.testing.assert_array_equal(clone(examples()), y)
    assert clone.get_config() == layer.get_config()


def test_clones_of_a_compiled_model_are_not_compiled():
    expert = sequential()
    expert.compile("sgd", "mse", metrics=["mae"])
    moe = SparseMoE(2, experts=expert, k=1, name="moe")
    model = keras.Sequential([keras.Input((WIDTH,)), moe])
    model.compile("sgd", "mse")
    x = examples()
    logs = model.evaluate(x, x[:, :3], verbose=0, return_dict=True)
    names = {"cv_importance", "cv_load", "max_over_mean_load"}
    assert logs.keys() == {"loss", *(f"moe/{name}" for name in names)}


@pytest.mark.parametrize("factor", FACTORS)
def test_a_mixture_of_mixtures(factor):
    inner = SparseMoE(3, HIDDEN, k=1, name="inner")
    layer = SparseMoE(2, experts=inner, k=2, capacity_factor=factor)
    with_random_weights(layer)
    x = examples()
    if keras.config.backend() == "jax":  # Evaluation drops nothing, so it has no capacity there.
        with pytest.raises(ValueError, match="as evaluation, which drops nothing, always needs"):
            step(layer, x, training=False)
        return
    y, losses, gradients, d_experts = step(layer, x, training=False)
    gates = np.zeros((24, 2))
    routing = layer.route(x)
    np.put_along_axis(gates, numpy(routing.expert_index), numpy(routing.gates), axis=1)
    parts = [numpy(expert(x)) for expert in layer.experts.layers]
    np.testing.assert_allclose(
        y, gates[:, :1] * parts[0] + gates[:, 1:] * parts[1], rtol=1e-5, atol=1e-5
    )
    assert len(losses) == 2 + 2 * 2  # the mixture's own, then those of each expert
    for gradient in keras.tree.flatten(d_experts):
        assert gradient is None or np.isfinite(gradient).all()


@keras.saving.register_keras_serializable("tests")
class NoRows(keras.layers.Layer):
    def call(self, x):
        return ops.sum(x, axis=0, keepdims=True)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("dense", "`layer` must be a Keras layer or model. Received: 'dense'"),
        (NoRows(), r"rows \[rows, D\] into rows .*Received: 'no_rows_1', .* into \(1, 6\)"),
        (keras.layers.RepeatVector(2), r"Received: 'repeat_vector_1', .* into \(None, 2, 6\)"),
    ],
)
def test_layers_of_another_kind_are_refused(layer, message):
    with pytest.raises(ValueError, match=message):
        LayerExperts(2, layer).build((None, WIDTH))


def test_mixed_precision():
    layer = SparseMoE(3, experts=sequential(dtype="float32"), k=2, dtype="mixed_bfloat16")
    y = layer(np.ones((2, 3, WIDTH)), training=True)
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"


@pytest.mark.parametrize("inputs", [False, True])
def test_experts_with_a_lambda_layer(inputs, tmp_path):
    parts = [keras.layers.Dense(WIDTH), keras.layers.Lambda(lambda x: x * 2)]
    expert = keras.Sequential([keras.Input((WIDTH,)), *parts] if inputs else parts)
    layer = SparseMoE(3, experts=expert, k=2, num_shared_experts=1)
    model = keras.Sequential([keras.Input((WIDTH,)), layer])
    x = examples()
    # By hand: twice what the Dense layers give, times the gates; expert 2 gets nothing.
    routing = layer.route(x)
    assert not np.any(numpy(routing.expert_index) == 2)
    dense = [bank.layers[0] for bank in (*layer.experts.layers[:2], *layer.shared_experts.layers)]
    expected = dense[0](x) + dense[1](x) + 2 * dense[2](x)
    np.testing.assert_allclose(model(x), expected, rtol=1e-5, atol=1e-5)
    layer.gating.gate_kernel.assign(np.random.default_rng(0).normal(size=(WIDTH, 3)))
    for new in (keras_moe.grow(layer, 6, k=4), keras_moe.prune(layer, [2, 0, 1])):
        np.testing.assert_allclose(new(x), model(x), rtol=1e-5, atol=1e-5)

    # In files Keras' own rules hold.
    model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="safe_mode=False"):
        keras.models.load_model(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", safe_mode=False)
    np.testing.assert_array_equal(loaded(x), model(x))


def test_a_file_cannot_smuggle_a_function_in_as_a_change_of_single_experts():
    layer = LayerExperts(2, keras.layers.Dense(WIDTH))
    layer.build((None, WIDTH))
    function = keras.saving.serialize_keras_object(keras.layers.Lambda(lambda x: x))
    config = layer.get_config()
    name = config["layer"]["config"]["name"]
    changes = [{name: {"quantization_config": function}}, {}]
    # In Keras 3.10 no layer has such an argument.
    refusals = "safe_mode=False|Unrecognized keyword arguments passed to Dense"
    with pytest.raises((ValueError, TypeError), match=refusals):
        LayerExperts.from_config({**config, "changes": changes})


def test_experts_are_layers_of_their_own_while_keras_shares_objects():
    expert = sequential()
    with ObjectSharingScope():  # as `load_model` does
        banks = [LayerExperts(3, expert) for _ in range(2)]
    assert len({id(layer) for bank in banks for layer in bank.layers}) == 6
    assert "shared_object_id" not in str(banks[1].get_config())
