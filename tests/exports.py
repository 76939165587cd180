"""A model to export and its export: what the tests of exports share."""

import numpy as np
import tensorflow as tf
from helpers import CROSS_ENTROPY, assign_random_weights, language_model, next_words

import keras_moe

TOKENS = tf.TensorSpec([None, None], "int32", "tokens")


def export(model, path, name="tokens", **kwargs):
    """Exports a model of one input, and loads its `serving_default`."""
    served = tf.saved_model.load(keras_moe.export_saved_model(model, path, **kwargs))
    return lambda x: served.signatures["serving_default"](**{name: x})["outputs"], served


def assert_keeps_no_state(served):
    """No signature of a SavedModel writes a variable or draws a random number."""
    for signature in served.signatures.values():
        graph = signature.graph.as_graph_def()
        functions = [graph.node, *(function.node_def for function in graph.library.function)]
        operations = {node.op for nodes in functions for node in nodes}
        assert "MatMul" in operations
        assert not {op for op in operations if "Assign" in op or "Random" in op}


def train(**options):
    """A language model that was trained, so that it has metrics, seeds and an optimizer."""
    model, (x, y) = language_model(**options), next_words()
    model.compile("adam", CROSS_ENTROPY, metrics=["accuracy"])
    model.fit(x, y, verbose=0)
    assign_random_weights(model, np.random.default_rng(0), scale=0.5)
    return model, tf.constant(x, "int32")
