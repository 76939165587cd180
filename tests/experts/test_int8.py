"""Feed-forward experts in int8."""

import contextlib

import keras
import numpy as np
import pytest
from combinations import few_in_jax
from helpers import EVERY_LAYER, WIDTH, examples, with_random_weights
from keras.ops import convert_to_numpy as numpy

import keras_moe
from keras_moe import FeedForwardExperts
from keras_moe.backend import devices


def quantized(make, **options):
    """A layer in int8, and one that has in float32 what the integers and scales stand for."""
    layer = with_random_weights(make(**options), scale=0.5)
    twin = type(layer).from_config(layer.get_config())
    twin.build((None, WIDTH))
    twin.set_weights(layer.get_weights())
    layers = [(layer.experts, twin.experts), (layer.shared_experts, twin.shared_experts)]
    for bank, of_twin in layers[: 1 + (layer.num_shared_experts > 0)]:
        bank.quantize("int8")
        for kernel, scales, plain in zip(bank.kernels, bank.scales, of_twin.kernels, strict=True):
            plain.assign(numpy(kernel).astype("float32") / numpy(scales))
    return layer, twin


def test_each_output_of_each_expert_has_a_scale():
    bank = with_random_weights(FeedForwardExperts(3, [4, 5], use_bias=True, activation="swiglu"))
    before, biases = [numpy(kernel) for kernel in bank.kernels], [numpy(b) for b in bank.biases]
    before[0][1, :, 2] = 0.0
    bank.kernels[0].assign(before[0])
    bank.quantize("int8")
    for kernel, scales, weights in zip(bank.kernels, bank.scales, before, strict=True):
        assert (kernel.dtype, scales.dtype) == ("int8", "float32")
        assert scales.shape == (3, 1, weights.shape[-1])
        largest = np.abs(weights).max(axis=1, keepdims=True)
        # 127 integers to each side, rounded to the nearest.
        assert np.all(np.abs(numpy(kernel) / numpy(scales) - weights) <= largest / 253.9 + 1e-6)
        assert np.all(np.abs(numpy(kernel)).max(axis=1, keepdims=True)[largest > 0] == 127)
    for bias, values in zip(bank.biases, biases, strict=True):
        np.testing.assert_array_equal(bias, values)
    assert [w.name for w in bank.trainable_weights] == ["bias_0", "bias_1", "bias_2"]


@pytest.mark.parametrize("make", few_in_jax(EVERY_LAYER, ["noisy_top_k", "hierarchical_capacity"]))
def test_a_layer_computes_with_what_the_integers_stand_for(make):
    options = {"use_bias": True, "activation": "swiglu", "num_shared_experts": 1}
    layer, twin = quantized(make, **options)
    for number in (0, 1, 24):
        np.testing.assert_allclose(
            layer(examples(number)), twin(examples(number)), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("gpu", [False, True] if keras.config.backend() == "tensorflow" else [None])
def test_masked_examples_stay_zero(gpu):
    layer, twin = quantized(EVERY_LAYER["noisy_top_k"], use_bias=True)
    mask = np.arange(24) % 4 > 0  # Rows of masked examples belong to no expert, and have no scale.
    with contextlib.nullcontext() if gpu is None else devices.choosing(int(gpu)):
        received, expected = (numpy(moe(examples(), mask=mask)) for moe in (layer, twin))
    np.testing.assert_allclose(received, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(received[~mask], np.zeros_like(received[~mask]))


def test_it_computes_in_bfloat16_too():
    layer, twin = quantized(EVERY_LAYER["noisy_top_k"], dtype="mixed_bfloat16")
    y = layer(examples())
    assert y.dtype == "bfloat16"
    # Two roundings to 8 bits more, of the scales.
    largest = np.abs(numpy(twin(examples())).astype("float32")).max()
    np.testing.assert_allclose(
        numpy(y).astype("float32"), numpy(twin(examples())), atol=0.02 * largest
    )


def test_other_experts_are_not_read():
    layer, _ = quantized(EVERY_LAYER["noisy_top_k"])
    for number in (1, 2):
        x = examples(number)
        sound = layer(x)
        unused = np.setdiff1d(np.arange(5), layer.route(x).expert_index)
        assert unused.size
        before = [numpy(scales) for scales in layer.experts.scales]
        for scales, values in zip(layer.experts.scales, before, strict=True):
            poisoned = values.copy()
            poisoned[unused] = np.nan
            scales.assign(poisoned)
        np.testing.assert_array_equal(layer(x), sound)
        for scales, values in zip(layer.experts.scales, before, strict=True):
            scales.assign(values)


@pytest.mark.parametrize("name", ["noisy_top_k", "hierarchical_capacity"])
def test_it_is_saved_and_loaded(name, tmp_path):
    layer, _ = quantized(EVERY_LAYER[name], num_shared_experts=1)
    model = keras.Sequential([keras.Input((WIDTH,), name="x"), layer])
    expected = numpy(model(examples()))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(examples()), expected)
    again = keras.models.model_from_json(loaded.to_json())
    again.set_weights(loaded.get_weights())
    np.testing.assert_array_equal(again(examples()), expected)


@pytest.mark.tensorflow("exports are TensorFlow's")
@pytest.mark.parametrize("name", ["noisy_top_k", "hierarchical_capacity"])
def test_it_is_exported(name, tmp_path):
    import tensorflow as tf

    layer, _ = quantized(EVERY_LAYER[name], num_shared_experts=1)
    model = keras.Sequential([keras.Input((WIDTH,), name="x"), layer])
    expected = numpy(model(examples()))
    for dtype in (None, "bfloat16"):
        path = keras_moe.export_saved_model(model, tmp_path / "served", dtype=dtype)
        served = tf.saved_model.load(path)
        answer = served.signatures["serving_default"](x=examples())["outputs"]
        np.testing.assert_allclose(answer, expected, rtol=1e-5, atol=1e-5)
        # Gating, and of experts and shared experts two kernels with scales each.
        assert sorted(v.dtype.name for v in served.stored if v.shape.rank == 3) == sorted(
            4 * ["float32", "int8"] + ["float32"] * (name == "hierarchical_capacity")
        )


def test_experts_are_pruned_as_they_are():
    layer, twin = quantized(EVERY_LAYER["noisy_top_k"])
    pruned, expected = (keras_moe.prune(moe, [4, 0, 3]) for moe in (layer, twin))
    assert pruned.experts.kernels[0].dtype == "int8"
    np.testing.assert_allclose(pruned(examples()), expected(examples()), rtol=1e-5, atol=1e-5)


def test_training_is_refused():
    layer, _ = quantized(EVERY_LAYER["noisy_top_k"])
    model = keras.Sequential([keras.Input((WIDTH,)), keras.layers.Dense(WIDTH), layer])
    model.compile("sgd", "mse")
    assert np.all(np.isfinite(model.evaluate(examples(), examples(), verbose=0)))
    with pytest.raises(ValueError, match="int8 are there to be used, not to be trained"):
        model.fit(examples(), examples(), verbose=0)
    if keras.config.backend() != "jax":  # There Keras leaves no values behind where `fit` fails.
        assert np.all(np.isfinite(model.evaluate(examples(), examples(), verbose=0)))


def test_what_else_keras_offers_is_refused_and_changes_nothing():
    layer = with_random_weights(EVERY_LAYER["noisy_top_k"]())
    before = numpy(layer(examples()))
    quantizer = keras.quantizers.AbsMaxQuantizer(axis=0)
    offers = [{"mode": "float8"}]
    if hasattr(keras.quantizers, "Int8QuantizationConfig"):  # Keras 3.10 has no more than float8.
        config = keras.quantizers.Int8QuantizationConfig(weight_quantizer=quantizer)
        offers += [{"mode": "int4"}, {"config": config}]
    for arguments in offers:
        with pytest.raises(
            NotImplementedError, match='Use `quantize\\("int8"\\)`. Received: layer'
        ):
            layer.experts.quantize(**arguments)
    np.testing.assert_array_equal(layer(examples()), before)
    layer.experts.quantize("int8")
    with pytest.raises(ValueError, match="already quantized"):
        layer.experts.quantize("int8")
