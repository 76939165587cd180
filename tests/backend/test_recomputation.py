"""Functions that the backward pass computes again."""

import numpy as np
import pytest
import tensorflow as tf
from helpers import WIDTH, assert_agrees, examples, run, value_and_gradients, with_random_weights

from keras_moe import NoisyTopKGating, SparseMoE
from keras_moe.backend.tensorflow.recomputation import recomputed


def test_a_recomputed_function_is_computed_once_more():
    calls = []

    def function(x, kernel):
        calls.append(1)
        return tf.tanh(x @ kernel)

    rng = np.random.default_rng(0)
    x, kernel = (tf.constant(rng.normal(size=size), tf.float32) for size in ((5, 3), (3, 2)))
    y, gradients = value_and_gradients(function, x, kernel)
    assert len(calls) == 1
    y_again, gradients_again = value_and_gradients(recomputed(function), x, kernel)
    assert len(calls) == 3  # forward, and in the backward pass
    np.testing.assert_array_equal(y_again, y)
    for ours, theirs in zip(gradients_again, gradients, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.cpu
def test_recomputing_survives_the_optimizer_of_the_graph():
    def function(x, kernel):
        return tf.tanh(tf.tanh(x @ kernel) @ kernel)

    def tanhs_run(function):
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            x = tf.compat.v1.placeholder(tf.float32, (4, 4))
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = function(x, tf.eye(4) * x)
            results = y, tape.gradient(y, x)
            options = tf.compat.v1.RunOptions(output_partition_graphs=True)
            metadata = tf.compat.v1.RunMetadata()
            session.run(results, {x: np.ones((4, 4))}, options, metadata)
        (optimized,) = metadata.partition_graphs
        return sum(node.op == "Tanh" for node in optimized.node)

    assert tanhs_run(function) == 2
    assert tanhs_run(recomputed(function)) == 4


@pytest.mark.parametrize(
    ("factor", "way"), [(None, "eager"), (None, "graph, any batch"), (0.7, "eager"), (0.7, "xla")]
)
def test_a_layer_that_recomputes_gives_the_same(factor, way):
    gating = NoisyTopKGating(5, k=2, noise=False)
    options = {"gating": gating, "activation": "geglu", "use_bias": True, "num_shared_experts": 1}
    plain, recomputing = (
        with_random_weights(
            SparseMoE(5, [4, 3], capacity_factor=factor, recompute=recompute, **options),
            scale=0.5,
        )
        for recompute in (False, True)
    )
    mask = np.arange(24) % 4 > 0
    upstream = np.random.default_rng(1).normal(size=(24, WIDTH))
    received, expected = (
        run(layer, examples(), upstream, training=True, mask=mask, way=way)
        for layer in (recomputing, plain)
    )
    for ours, theirs in zip(tf.nest.flatten(received), tf.nest.flatten(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    if way == "eager":
        assert_agrees(recomputing, examples(), training=True, mask=mask)


@pytest.mark.parametrize("factor", [None, 2.0])
@pytest.mark.parametrize("recompute", [True, False])
def test_a_layer_computes_hidden_activations_again_if_it_is_told_to(recompute, factor):
    calls = []

    def counted(z):
        calls.append(1)
        return tf.nn.relu(z)

    layer = SparseMoE(5, 4, k=2, activation=counted, recompute=recompute, capacity_factor=factor)
    with_random_weights(layer)
    x = tf.constant(examples())
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=True)
    before = len(calls)
    tape.gradient(y, x)
    assert len(calls) - before == int(recompute)
