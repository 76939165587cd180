"""A served row gets its answer whatever else is in the batch: servers put requests together."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from combinations import usually
from helpers import EVERY_LAYER, WIDTH, assign_random_weights, examples

import keras_moe

BATCH = 64
pytestmark = pytest.mark.usefixtures("for_cpus")


def layer_experts():
    expert = keras.Sequential([keras.layers.Dense(4, "gelu"), keras.layers.Dense(WIDTH)])
    return keras_moe.SparseMoE(5, experts=expert, k=2)


LAYERS = {**EVERY_LAYER, "layer_experts": layer_experts}
OTHERS = ["softmax", "balanced_capacity", "hierarchical_capacity"]


@pytest.mark.parametrize("name", usually([n for n in LAYERS if n not in OTHERS], OTHERS))
def test_a_row_is_answered_as_if_it_were_alone(name, tmp_path):
    model = keras.Sequential([keras.Input((WIDTH,), name="x"), LAYERS[name]()])
    assign_random_weights(model, np.random.default_rng(0), scale=0.5)
    served = tf.saved_model.load(keras_moe.export_saved_model(model, tmp_path))

    def answer(x):
        return served.signatures["serving_default"](x=tf.constant(x))["outputs"].numpy()

    x = examples(BATCH)
    together = answer(x)
    for i in range(0, BATCH, 9):
        alone = answer(x[i : i + 1])
        np.testing.assert_allclose(together[i : i + 1], alone, rtol=1e-6, atol=1e-6)
        broken = np.full_like(x, np.nan)
        broken[i] = x[i]
        np.testing.assert_allclose(answer(broken)[i : i + 1], alone, rtol=1e-6, atol=1e-6)
    assert np.abs(together).max() > 0.1  # Not all rows have fallen below the thresholds.


def test_what_a_batch_changes_is_no_more_than_of_dense_layers():
    width, rows = 512, np.random.default_rng(0).normal(size=(64, 512)).astype("float32")
    dense = [keras.layers.Dense(1024, "relu"), keras.layers.Dense(width)]
    mixture = keras_moe.SparseMoE(16, 1024, k=4)
    for layers in (dense, [mixture]):
        model = keras.Sequential([keras.Input((width,)), *layers])
        if mixture in layers:
            assign_random_weights(mixture.gating, np.random.default_rng(1), scale=width**-0.5)
        answer = tf.function(model, autograph=False)
        together = answer(tf.constant(rows))
        alone = tf.concat([answer(tf.constant(rows[i : i + 1])) for i in range(0, 64, 7)], axis=0)
        # Sums of 512 and of 1024 products in another order: about √1024 · 2^-24 of them, 2e-6.
        difference = np.abs(together[::7] - alone).max() / np.abs(together).max()
        assert difference < 5e-6, layers
