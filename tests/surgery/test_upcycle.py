"""`upcycle`: a layer whose experts are copies of a dense feed-forward block."""

import keras
import numpy as np
import pytest
from helpers import WIDTH, assign_random_weights
from trained_layers import X, arrays, assert_same, assert_trains_saves_and_loads, run_example

import keras_moe
from keras_moe import SparseMoE


def dense_layers(*units, width=WIDTH, last="linear", **kwargs):
    layers = [
        keras.layers.Dense(n, **{"activation": "gelu" if i < len(units) - 1 else last, **kwargs})
        for i, n in enumerate(units)
    ]
    for layer, n in zip(layers, [width, *units], strict=False):
        layer.build((None, n))
        assign_random_weights(layer, np.random.default_rng(n))
    return layers


@pytest.mark.parametrize(
    ("units", "kwargs", "moe_kwargs"),
    [
        ((16, WIDTH), {}, {"k": 2}),
        ((16, 3), {"use_bias": False}, {"k": 4, "seed": 1}),
        ((8, 12, 5), {}, {"k": 3}),
        ((16, WIDTH), {}, {"gating": "softmax"}),
    ],
)
@pytest.mark.parametrize("as_model", [False, True])
def test_an_upcycled_layer_computes_what_the_dense_layers_did(units, kwargs, moe_kwargs, as_model):
    layers = dense_layers(*units, **kwargs)
    dense = keras.Sequential([keras.Input((WIDTH,)), *layers])
    before = arrays(dense)
    moe = keras_moe.upcycle(dense if as_model else layers, 4, **moe_kwargs)
    assert moe.built and moe.num_experts == 4
    np.testing.assert_allclose(moe(X), dense(X), rtol=1e-5, atol=1e-5)
    # Noise picks other experts, all of them equal; the gates sum to 1 all the same.
    np.testing.assert_allclose(moe(X, training=True), dense(X), rtol=1e-5, atol=1e-5)
    assert_same(arrays(dense), before)


def test_with_one_expert_per_example_the_first_gate_is_one_in_n():
    layers = dense_layers(16, WIDTH)
    moe = keras_moe.upcycle(layers, 4, k=1)
    # Equal logits of zero: the probability of each of 4 experts is 1/4.
    np.testing.assert_allclose(moe(X), layers[1](layers[0](X)) / 4, rtol=1e-5, atol=1e-6)


def test_an_upcycled_layer_takes_arguments_and_the_dtype():
    layers = dense_layers(16, WIDTH, dtype="mixed_bfloat16")
    moe = keras_moe.upcycle(
        layers, 4, k=2, name="moe", load_loss_weight=0.5, kernel_regularizer="l2"
    )
    config = moe.get_config()
    assert (config["name"], config["load_loss_weight"], moe.k) == ("moe", 0.5, 2)
    assert moe.experts.kernel_regularizer is not None
    assert moe.dtype_policy.name == moe.experts.dtype_policy.name == "mixed_bfloat16"
    assert keras_moe.upcycle(layers, 4, dtype="float32").dtype_policy.name == "float32"


def test_an_upcycled_layer_trains_saves_and_loads(tmp_path):
    moe = keras_moe.upcycle(dense_layers(16, WIDTH), 4, k=2, seed=0)
    assert_trains_saves_and_loads(moe, tmp_path)
    # The noise has told the copies apart.
    kernels = keras.ops.convert_to_numpy(moe.experts.kernels[0])
    for i in range(1, 4):
        assert np.abs(kernels[i] - kernels[0]).max() > 1e-3


def quantized():
    layers = dense_layers(16, WIDTH)
    layers[0].quantize("int8")
    return layers


@pytest.mark.parametrize(
    ("layers", "kwargs", "message"),
    [
        (lambda: dense_layers(16), {}, "at least one hidden layer.*1 layers"),
        (lambda: [], {}, "at least one hidden layer.*0 layers"),
        (lambda: [*dense_layers(16, 6), keras.layers.Dropout(0.1)], {}, "must be a.*Dropout"),
        (quantized, {}, "not quantized"),
        (lambda: [*dense_layers(16, 6)[:1], keras.layers.Dense(6)], {}, "build .* first"),
        (
            lambda: [*dense_layers(16, 6)[:1], *dense_layers(8, 6)[1:]],
            {},
            r"take what the one before.*\[\(6, 16\), \(8, 6\)\]",
        ),
        (lambda: dense_layers(16, 6, last="gelu"), {}, "must be linear.*'gelu'"),
        (
            lambda: [*dense_layers(6, 6, use_bias=False)[:1], *dense_layers(6, 6)[1:]],
            {},
            r"must have a bias.*\[False, True\]",
        ),
        (
            lambda: [*dense_layers(6, 6, last="relu"), *dense_layers(6, 6)[1:]],
            {},
            r"one activation.*\['gelu', 'relu'\]",
        ),
        (lambda: dense_layers(16, 6), {"activation": "relu"}, "leave them out.*activation"),
        (lambda: dense_layers(16, 6), {"k": 5}, "`k`.*k=5, num_experts=4"),
    ],
)
def test_upcycling_says_what_it_cannot_take(layers, kwargs, message):
    with pytest.raises(ValueError, match=message):
        keras_moe.upcycle(layers(), 4, **kwargs)


def test_the_example_of_upcycle_runs():
    inputs = keras.Input((WIDTH,))
    hidden = keras.layers.Dense(16, activation="relu", name="up")(inputs)
    outputs = keras.layers.Dense(2)(inputs + keras.layers.Dense(WIDTH, name="down")(hidden))
    model = keras.Model(inputs, outputs)
    upcycled = run_example(keras_moe.upcycle, model)
    assert any(isinstance(layer, SparseMoE) for layer in upcycled.layers)
    np.testing.assert_allclose(upcycled(X), model(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "behind", [keras.layers.ReLU(max_value=1.0), keras.layers.Activation("tanh")]
)
def test_an_activation_layer_is_that_of_the_layer_before_it(behind):
    up, down = dense_layers(16, WIDTH, activation="linear")
    moe = keras_moe.upcycle([up, behind, down], 4, k=2)
    np.testing.assert_allclose(moe(X), down(behind(up(X))), rtol=1e-5, atol=1e-5)
    copied = type(moe).from_config(moe.get_config())
    assert type(copied.experts.activation) is type(moe.experts.activation)
    with pytest.raises(ValueError, match="behind a linear .*Received: .*behind None"):
        keras_moe.upcycle([behind, up, down], 4)
    with pytest.raises(ValueError, match="behind a linear"):
        keras_moe.upcycle([up, behind, behind, down], 4)
