"""An export can be trained in front of and behind: its gradients are those of the Keras model."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from combinations import covering, usually
from helpers import EVERY_LAYER, WIDTH, examples, with_random_weights

import keras_moe
from keras_moe import SparseMoE


def as_model(layer):
    return keras.Sequential([keras.Input((WIDTH,), name="x"), layer])


def gradients(function, x, variables):
    with tf.GradientTape() as tape:
        tape.watch(x)
        total = tf.reduce_sum(tf.sin(function(x)))
    found = tape.gradient(total, [x, *variables], unconnected_gradients="zero")
    return [tf.convert_to_tensor(gradient).numpy() for gradient in found]


def assert_same_gradients(function, variables, model):
    """Of one example and of many; `variables` of an export are those of the model in any order."""
    weights = [weight.value for weight in model.trainable_weights]
    for number in (1, 7):
        x = tf.constant(examples(number))
        of_x, *others = gradients(function, x, variables)
        wanted, *of_weights = gradients(lambda x: model(x, training=False), x, weights)
        assert np.any(wanted)
        np.testing.assert_allclose(of_x, wanted, rtol=1e-4, atol=1e-5)
        key = lambda gradient: (gradient.shape, np.abs(gradient).sum())  # noqa: E731
        others = sorted((g for g in others if np.any(g)), key=key)
        of_weights = sorted((g for g in of_weights if np.any(g)), key=key)
        for ours, theirs in zip(others, of_weights, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def by_keras(model, folder):
    """An export as a function, and its variables."""
    model.export(folder, verbose=False)
    loaded = tf.saved_model.load(folder)
    return loaded.serve, loaded.trainable_variables


def for_serving(model, folder):
    served = tf.saved_model.load(keras_moe.export_saved_model(model, folder))
    return lambda x: served.signatures["serving_default"](x=x)["outputs"], served.stored


EXPORTS = {"by_keras": by_keras, "for_serving": for_serving}


@covering(
    usual=[
        ("noisy_top_k", "by_keras"),
        ("strictly_balanced", "for_serving"),
        ("capacity", "by_keras"),
        ("hierarchical", "for_serving"),
    ],
    make=EVERY_LAYER,
    export=EXPORTS,
)
def test_of_every_layer(make, export, tmp_path):
    model = as_model(with_random_weights(make(use_bias=True, num_shared_experts=1)))
    assert_same_gradients(*export(model, tmp_path), model)


@covering(
    usual=[("layers", "by_keras"), ("int8", "for_serving")],
    name=["layers", "int8", "recompute"],
    export=EXPORTS,
)
def test_of_other_experts(name, export, tmp_path):
    experts = {"experts": keras.layers.Dense(WIDTH)} if name == "layers" else {"hidden_units": 4}
    layer = SparseMoE(5, k=2, recompute=name == "recompute", **experts)
    model = as_model(with_random_weights(layer))
    if name == "int8":
        layer.experts.quantize("int8")
    assert_same_gradients(*export(model, tmp_path), model)


def test_masked_positions_have_none(tmp_path):
    layer = with_random_weights(EVERY_LAYER["noisy_top_k"]())
    model = keras.Sequential([keras.Input((3, WIDTH)), keras.layers.Masking(), layer])
    model.export(tmp_path / "model", verbose=False)
    x = examples(6).reshape(2, 3, WIDTH)
    x[:, 2] = 0
    loaded = tf.saved_model.load(tmp_path / "model")
    (gradient,) = gradients(loaded.serve, tf.constant(x), [])
    (wanted,) = gradients(model, tf.constant(x), [])
    assert np.any(wanted[:, :2]) and not np.any(gradient[:, 2])
    np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", usually(["hierarchical"], ["noisy_top_k"]))
def test_a_head_and_a_foot_learn_on_a_frozen_export(name, tmp_path):
    model = as_model(with_random_weights(EVERY_LAYER[name]()))
    model.export(tmp_path / "model", verbose=False)
    body = keras.layers.TFSMLayer(tmp_path / "model", call_endpoint="serve", trainable=False)
    inputs = keras.Input((WIDTH,))
    foot, head = keras.layers.Dense(WIDTH), keras.layers.Dense(1)
    transfer = keras.Model(inputs, head(body(foot(inputs))))
    before = [foot.get_weights()[0], head.get_weights()[0]]
    transfer.compile("sgd", "mse")
    transfer.fit(examples(), examples()[:, :1], verbose=0)
    for layer, kernel in zip((foot, head), before, strict=True):
        assert np.any(layer.get_weights()[0] != kernel)


def test_in_a_graph_for_any_batch_gradients_outside_training_are_those_of_eager_code():
    layer = with_random_weights(EVERY_LAYER["noisy_top_k"](use_bias=True))
    weights = [weight.value for weight in layer.trainable_weights]
    signature = [tf.TensorSpec([None, WIDTH])]

    def all_gradients(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            total = tf.reduce_sum(tf.sin(layer(x, training=False)))
        return tape.gradient(total, [x, *weights], unconnected_gradients="zero")

    in_graph = tf.function(all_gradients, input_signature=signature, autograph=False)
    for number in (0, 1, 7):
        x = tf.constant(examples(number))
        for ours, wanted in zip(in_graph(x), all_gradients(x), strict=True):
            np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5)
