"""A single example outside training goes to its experts without being sorted."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from combinations import covering, usually
from helpers import (
    EVERY_LAYER,
    WIDTH,
    assert_agrees,
    examples,
    spoil_other_experts,
    with_random_weights,
)

from keras_moe import Routing, SparseMoE, dispatch

WAYS = ["eager", "graph", "graph, any batch"]
NAMES = ["noisy_top_k", "softmax", "hierarchical"]


@covering(
    usual=[
        *((name, "eager") for name in NAMES),
        *(("softmax", "graph"), ("noisy_top_k", WAYS[2]), ("hierarchical", WAYS[2])),
    ],
    name=NAMES,
    way=WAYS,
)
def test_a_layer_agrees_with_the_oracle(name, way):
    layer = with_random_weights(EVERY_LAYER[name](use_bias=True, activation="swiglu"))
    for number in (1, 2):  # In a graph for any batch one branch must not disturb the other.
        assert_agrees(layer, examples(number), training=False, way=way)


@pytest.mark.parametrize("way", usually(["xla, any batch"], ["xla"]))
def test_a_compiled_layer_agrees_with_the_oracle(way):
    layer = with_random_weights(EVERY_LAYER["capacity"]())
    for number in (1, 2):
        assert_agrees(layer, examples(number), training=False, way=way)


@pytest.mark.parametrize("name", ["noisy_top_k", "hierarchical"])
def test_a_masked_example_gives_zeros(name):
    layer = with_random_weights(EVERY_LAYER[name](use_bias=True))
    assert_agrees(layer, examples(1), training=False, mask=np.array([False]))
    for kernel in layer.experts.kernels:  # Nothing of any expert is in them, not even 0·NaN.
        kernel.assign(np.full(kernel.shape, np.nan))
    np.testing.assert_array_equal(layer(examples(1), mask=np.array([False])), 0.0)


def test_nothing_is_sorted(monkeypatch):
    layer = with_random_weights(EVERY_LAYER["noisy_top_k"]())
    x = examples(2)
    together = layer(x)

    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(dispatch, "make_plan", refuse)
    for i in range(2):
        np.testing.assert_allclose(layer(x[i : i + 1]), together[i : i + 1], rtol=1e-6, atol=1e-6)
    for several, training in ((x, False), (x[:1], True)):
        with pytest.raises(AssertionError):
            layer(several, training=training)


@pytest.mark.parametrize("num_experts", [5, 80])
def test_other_experts_weights_are_left_alone(num_experts):
    layer = with_random_weights(SparseMoE(num_experts, 4, k=2))
    answer = tf.function(layer, input_signature=[tf.TensorSpec([None, WIDTH])], autograph=False)
    x = examples(1)
    sound = answer(x)
    spoil_other_experts(layer, x)
    np.testing.assert_array_equal(answer(x), sound)


@pytest.mark.parametrize("nobody", [-1, 5])
def test_a_choice_with_gate_0_may_name_no_expert(nobody):
    class OneChoice(keras.layers.Layer):
        """Says that the second of two choices is none, by an index without an expert."""

        def call(self, x, training=None, mask=None):
            index = tf.stack([2 * tf.ones_like(x[:, 0]), nobody * tf.ones_like(x[:, 0])], axis=1)
            gates = tf.stack([tf.ones_like(x[:, 0]), tf.zeros_like(x[:, 0])], axis=1)
            even = tf.ones([5])
            return Routing(tf.cast(index, tf.int32), gates, even, even)

    layer = with_random_weights(SparseMoE(5, 4, gating=OneChoice()))
    x = examples(1)
    first, second = (kernel[2] for kernel in layer.experts.kernels)  # y is that of expert 2.
    np.testing.assert_allclose(layer(x), tf.nn.relu(x @ first) @ second, rtol=1e-5, atol=1e-6)


def test_an_example_of_nan_gives_nan_whatever_the_way():
    layer = with_random_weights(EVERY_LAYER["noisy_top_k"]())
    x = np.full((2, WIDTH), np.nan, "float32")
    assert np.isnan(layer(x)).all() and np.isnan(layer(x[:1])).all()
