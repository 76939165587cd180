"""Jacobians and vectorised maps give what the same loop gives turn by turn, and never abort."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from combinations import covering, usually
from helpers import EVERY_LAYER, WIDTH, examples, with_random_weights

from keras_moe import HierarchicalMoE, SparseMoE
from keras_moe.backend.tensorflow import vectorization

# One group, one expert, one shared expert: a batch of a single matrix, which has its own way.
SINGLE = {
    "a shared expert": lambda: SparseMoE(5, 4, k=2, num_shared_experts=1, use_bias=True),
    "an expert": lambda: SparseMoE(1, 4, k=1, capacity_factor=1.0, use_bias=True),
    "a group": lambda: HierarchicalMoE(1, 3, 4, k=(1, 2), capacity_factor=1.0),
}


def without_noise(layer):
    layer.gating.noise = False  # Every loop would draw its own.
    return layer


def assert_same_jacobians(layer, training):
    x = tf.constant(examples(8))
    weights = [weight.value for weight in layer.trainable_weights]
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        y = layer(x, training=training)
        some = y[:2]
    zero = tf.UnconnectedGradients.ZERO
    vectorised, looped = (
        [
            tape.batch_jacobian(y, x, experimental_use_pfor=use_pfor),
            *tape.jacobian(some, [x, *weights], zero, experimental_use_pfor=use_pfor),
        ]
        for use_pfor in (True, False)
    )
    for ours, wanted in zip(vectorised, looped, strict=True):
        assert np.any(wanted) or wanted.shape[2:] != x.shape
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5)


@covering(make=EVERY_LAYER, training=[False, True])
def test_jacobians(make, training):
    layer = without_noise(with_random_weights(make(use_bias=True)))
    assert_same_jacobians(layer, training)


@pytest.mark.parametrize("make", SINGLE.values(), ids=SINGLE.keys())
def test_jacobians_of_a_single_matrix(make):
    assert_same_jacobians(without_noise(with_random_weights(make())), training=True)


@pytest.mark.parametrize("recompute", [False, True])
def test_jacobians_through_layers_and_recomputation(recompute):
    experts = {"hidden_units": 4} if recompute else {"experts": keras.layers.Dense(WIDTH)}
    layer = with_random_weights(SparseMoE(5, k=2, recompute=recompute, **experts))
    assert_same_jacobians(without_noise(layer), training=True)


@pytest.mark.parametrize(
    "name",
    usually(
        ["noisy_top_k", "strictly_balanced", "hierarchical_capacity"],
        ["softmax", "capacity", "balanced_capacity", "hierarchical"],
    ),
)
def test_maps_of_examples_and_of_their_gradients(name):
    layer = without_noise(with_random_weights(EVERY_LAYER[name](use_bias=True)))
    x = tf.constant(examples(12).reshape(3, 4, WIDTH))
    weights = [weight.value for weight in layer.trainable_weights]

    def output_and_gradients(sequence):
        with tf.GradientTape() as tape:
            tape.watch(sequence)
            y = layer(sequence, training=True)
            total = tf.reduce_sum(tf.sin(y))
        sources = [sequence, *weights]
        return [y, *tape.gradient(total, sources, unconnected_gradients="zero")]

    wanted = tf.map_fn(output_and_gradients, x, [tf.float32] * (2 + len(weights)))
    for ours, theirs in zip(tf.vectorized_map(output_and_gradients, x), wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)

    def alone(row):
        return layer(row[None], training=False)[0]

    rows = tf.reshape(x, [-1, WIDTH])
    np.testing.assert_allclose(
        tf.vectorized_map(alone, rows), tf.map_fn(alone, rows), rtol=1e-4, atol=1e-5
    )


def test_layers_as_experts_refuse_a_vectorised_map():
    layer = with_random_weights(SparseMoE(5, k=2, experts=keras.layers.Dense(WIDTH)))
    with pytest.raises(ValueError, match="can't go through experts that are layers"):
        tf.vectorized_map(layer, tf.constant(examples(12).reshape(3, 4, WIDTH)))


def test_who_forbids_the_loop_is_told_why():
    layer = with_random_weights(EVERY_LAYER["noisy_top_k"]())
    x = tf.constant(examples(12).reshape(3, 4, WIDTH))
    with pytest.raises(ValueError, match="fallback_to_while_loop"):
        tf.vectorized_map(layer, x, fallback_to_while_loop=False)


def test_tensorflow_asks_the_operation_first():
    """The private attribute that this rests on: without it jacobians of a loop abort."""
    asked = []

    def double(row):
        y = vectorization.turn_by_turn(2 * row)
        convert = y.op.pfor_converter

        def listen(operation):
            asked.append(operation)
            return convert(operation)

        y.op.pfor_converter = listen
        return y

    np.testing.assert_array_equal(tf.vectorized_map(double, tf.range(3.0)), [0.0, 2.0, 4.0])
    assert asked
