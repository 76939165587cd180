"""`tf.debugging.enable_check_numerics` finds nothing in a sound model: no infinity, no NaN."""

import keras
import numpy as np
import pytest
from helpers import (
    EVERY_LAYER,
    WIDTH,
    call_and_gradients,
    every_layer,
    examples,
    with_random_weights,
)

from keras_moe import SparseMoE, models
from keras_moe.models.beam_search import NEVER, beam_search

if keras.config.backend() == "tensorflow":
    import tensorflow as tf

pytestmark = pytest.mark.tensorflow("it is TensorFlow's; JAX gives no numbers of single operations")


@pytest.fixture(autouse=True)
def checked():
    tf.debugging.enable_check_numerics()
    yield
    tf.debugging.disable_check_numerics()


def fit(layer, **options):
    model = keras.Sequential([keras.Input((WIDTH,)), layer])
    model.compile("sgd", "mse", **options)
    model.fit(examples(12), examples(12), batch_size=8, verbose=0)
    model.evaluate(examples(12), examples(12), verbose=0)
    model.predict(examples(1), verbose=0)


def test_it_is_on():
    with pytest.raises(tf.errors.InvalidArgumentError, match="Infinity"):
        tf.math.log(tf.zeros([1]))


@every_layer
def test_every_layer(make):
    fit(make(use_bias=True, router_z_loss_weight=0.1), run_eagerly=True)


def test_other_ways_through_the_layer():
    fit(SparseMoE(5, 4, k=1, recompute=True, num_shared_experts=1))
    fit(SparseMoE(5, k=5, experts=keras.layers.Dense(WIDTH)))


@every_layer
def test_nobody_and_nothing(make):
    layer = make(**({} if make is EVERY_LAYER["softmax"] else {"recompute": True}))
    layer.build((None, WIDTH))
    x, mask = examples(), np.zeros(len(examples()), bool)

    def gradient(x, mask):
        return call_and_gradients(layer, x, training=True, mask=mask)[2][0]

    np.testing.assert_array_equal(gradient(x, mask), 0.0)
    assert gradient(x[:0], mask[:0]).shape == (0, WIDTH)


def test_a_broken_example_is_found():
    layer = with_random_weights(EVERY_LAYER["noisy_top_k"]())
    x = tf.constant(np.full((2, WIDTH), np.nan, "float32"))
    with pytest.raises(tf.errors.InvalidArgumentError, match="NaN"):
        layer(x)


def test_models():
    ids = np.random.default_rng(0).integers(0, 20, (4, 5))
    model = models.LanguageModel(20, 8, SparseMoE(4, 8, k=2), num_sampled=4)
    model.compile("adam", run_eagerly=True)
    model.fit(ids, ids, verbose=0)
    model.evaluate(ids, ids, verbose=0)
    middle = SparseMoE(4, 8, k=2)
    model = models.TranslationModel(20, 8, decoder_middle=middle, lstm_units=8)
    model.compile("adam", run_eagerly=True)
    model.fit((ids, ids), ids, verbose=0)
    found = model.translate(ids, 2, excluded=[1], max_length=3)
    assert np.isfinite(found.scores).all()


def test_hypotheses_that_are_not_there_have_finite_scores():
    # The only word is the end: one hypothesis, with log 1, where there is room for two.
    def step(ids, state):
        return tf.zeros([1, 2, 1]), state, None

    found = beam_search(step, (), [0], end_id=0, max_length=2, beam_width=2, coverage_penalty=0.0)
    np.testing.assert_array_equal(found.scores, [[0.0, NEVER]])
    np.testing.assert_array_equal(found.lengths, [[1, 0]])
