"""What several test files share: weights, a small model, its data."""

import keras
import numpy as np

from keras_moe import SparseMoE

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
