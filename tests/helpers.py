"""What several test files share: weights, a small model, its data."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import HierarchicalMoE, SparseMoE

WIDTH = 6


def assign_random_weights(layer, rng):
    """Weights far from zero: initial gating kernels are zeros, which would test ties alone."""
    assert layer.built
    for weight in layer.weights:
        weight.assign(rng.normal(size=weight.shape))


def language_model(policy=None, **kwargs):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.layers.Embedding(50, 8, mask_zero=True, dtype=policy),
            SparseMoE(8, 16, k=2, name="moe", dtype=policy, **kwargs),
            keras.layers.Dense(50, dtype=policy),
        ]
    )


def next_words(batch=32, length=10):
    """Sequences that count upwards, of unequal length, padded with 0."""
    rng = np.random.default_rng(0)
    start = rng.integers(1, 20, size=(batch, 1))
    x = start + np.arange(length)
    x[np.arange(length) >= rng.integers(3, length, size=(batch, 1))] = 0
    return x, np.where(x > 0, x + 1, 0)


CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def assert_keeps_no_state(served):
    """No signature of a SavedModel writes a variable or draws a random number."""
    for signature in served.signatures.values():
        graph = signature.graph.as_graph_def()
        functions = [graph.node, *(function.node_def for function in graph.library.function)]
        operations = {node.op for nodes in functions for node in nodes}
        assert "MatMul" in operations
        assert not {op for op in operations if "Assign" in op or "Random" in op}


# One of each way through the layer, all of five or six experts: arguments to change are options.
EVERY_LAYER = {
    "noisy_top_k": lambda **options: SparseMoE(5, 4, **{"k": 2, **options}),
    "softmax": lambda **options: SparseMoE(5, 4, gating="softmax", **options),
    "strictly_balanced": lambda **options: SparseMoE(
        5, 4, **{"k": 2, "gating": "strictly_balanced", **options}
    ),
    "capacity": lambda **options: SparseMoE(5, 4, **{"k": 2, "capacity_factor": 1.0, **options}),
    "balanced_capacity": lambda **options: SparseMoE(
        5, 4, **{"k": 2, "gating": "strictly_balanced", "capacity_factor": 1.0, **options}
    ),
    "hierarchical": lambda **options: HierarchicalMoE(2, 3, 4, **options),
    "hierarchical_capacity": lambda **options: HierarchicalMoE(
        2, 3, 4, **{"capacity_factor": 1.0, **options}
    ),
}

every_layer = pytest.mark.parametrize("make", EVERY_LAYER.values(), ids=EVERY_LAYER.keys())


def with_random_weights(layer, width=WIDTH, seed=0):
    layer.build((None, width))
    assign_random_weights(layer, np.random.default_rng(seed))
    return layer


def call_and_gradients(layer, x, *, training, mask=None):
    """Output, losses, and all gradients of their sum: by `x`, then by every trainable weight."""
    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=training, mask=mask)
        loss_values = list(layer.losses)
        total = tf.add_n([tf.reduce_sum(y), *[tf.cast(loss, y.dtype) for loss in loss_values]])
    weights = [weight.value for weight in layer.trainable_weights]
    gradients = tape.gradient(total, [x, *weights], unconnected_gradients="zero")
    assert not any(isinstance(gradient, tf.IndexedSlices) for gradient in gradients)
    return y, loss_values, gradients
