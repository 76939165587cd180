"""A served row gets its answer whatever else is in the batch: servers put requests together."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import EVERY_LAYER, WIDTH, assign_random_weights, examples

import keras_moe

BATCH = 64


def layer_experts():
    expert = keras.Sequential([keras.layers.Dense(4, "gelu"), keras.layers.Dense(WIDTH)])
    return keras_moe.SparseMoE(5, experts=expert, k=2)


LAYERS = {**EVERY_LAYER, "layer_experts": layer_experts}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_a_row_is_answered_as_if_it_were_alone(make, tmp_path):
    model = keras.Sequential([keras.Input((WIDTH,), name="x"), make()])
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
