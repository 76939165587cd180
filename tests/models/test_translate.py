"""`TranslationModel.translate`: step by step what the whole model computes at once."""

import functools

import keras
import numpy as np
import pytest
from keras.ops import convert_to_numpy as numpy
from reference_beam_search import score

import keras_moe
from keras_moe import SparseMoE
from keras_moe.models import TranslationModel

VOCABULARY, PADDING, UNKNOWN, END = 12, 0, 1, 2
SOURCES = np.array([[5, 9, 7, 3, 6], [8, 4, 0, 0, 0], [3, 0, 0, 0, 0], [11, 10, 9, 8, 0]])
MOST = 7


def made(gating="noisy_top_k", **options):
    """A model with weights so large that it is sure of something else at every step."""
    keras.utils.set_random_seed(0)
    middles = [
        SparseMoE(4, 8, k=2, gating=gating, name=f"{part}_moe") for part in ("encoder", "decoder")
    ]
    model = TranslationModel(
        VOCABULARY, 8, *middles, lstm_units=10, **{"num_lstms": (3, 3), **options}
    )
    model.build(None)
    rng = np.random.default_rng(4)
    for weight in model.trainable_weights:
        weight.assign(rng.normal(size=weight.shape))
    if gating == "strictly_balanced":
        for middle in middles:
            # Some examples are above several thresholds, some above none.
            middle.gating.thresholds.assign([0.2, 0.4, 0.3, 0.6])
    return model


ALPHA, BETA = 0.6, 0.3


@pytest.fixture(scope="module")
def model():
    return made("strictly_balanced")


@functools.cache
def graph(model, width):
    """Translates in a graph that knows no sizes; with JAX, all of them."""
    options = {"beam_width": width, "length_penalty": ALPHA, "coverage_penalty": BETA}
    options |= {"end_id": END, "excluded": [UNKNOWN], "max_length": MOST}
    if keras.config.backend() == "jax":
        return model.make_translate_function(**options)
    import tensorflow as tf

    def translate(sources):
        return model.translate(sources, **options)

    signature = [tf.TensorSpec([None, None], tf.int32)]
    return tf.function(translate, input_signature=signature, autograph=False)


def translated(model, sources, width):
    return [numpy(part) for part in graph(model, width)(sources.astype("int32"))]


def behind(words):
    """What the model reads to predict words [B, L]."""
    return np.concatenate([np.full((len(words), 1), END), words[:, :-1]], axis=1)


def predict(model, inputs):
    """Log-probabilities; compiled once with JAX."""
    function = model.predict_on_batch if keras.config.backend() == "jax" else model
    return numpy(function(inputs))


def test_width_1_is_greedy_decoding_by_the_whole_model(model):
    ids, lengths, _ = translated(model, SOURCES, width=1)
    words = np.zeros((len(SOURCES), 0), int)
    ended = np.zeros(len(SOURCES), bool)
    for _ in range(MOST):
        longer = np.concatenate([words, np.zeros((len(SOURCES), 1), int)], axis=1)
        padded = np.pad(longer, [(0, 0), (0, MOST - longer.shape[1])])  # always of one size
        log_probs = predict(model, (SOURCES, behind(padded)))[:, longer.shape[1] - 1]
        log_probs[:, [PADDING, UNKNOWN]] = -np.inf
        longer[:, -1] = np.where(ended, PADDING, np.argmax(log_probs, axis=-1))
        words, ended = longer, ended | (longer[:, -1] == END)
    np.testing.assert_array_equal(ids[:, 0], words[:, : ids.shape[-1]])
    np.testing.assert_array_equal(lengths[:, 0], (words > 0).sum(axis=1))
    assert len({tuple(row) for row in words}) == len(SOURCES)  # Sources make a difference.
    assert not ended.all() and len(set(lengths[:, 0])) > 2


def test_scores_are_those_of_the_whole_model(model):
    found, mask = translated(model, SOURCES, width=3), SOURCES > 0
    encoded = model.encode(SOURCES)
    for place in range(3):
        ids, lengths, scores = (part[:, place] for part in found)
        log_probs = predict(model, (SOURCES, behind(ids)))
        _, attention = model.attention_lstm(
            model.target_embedding(behind(ids)),
            encoded,
            source_mask=mask,
            return_attention_scores=True,
        )
        for row, length in enumerate(lengths):
            log_prob = log_probs[row, np.arange(length), ids[row, :length]].sum()
            coverage = numpy(attention)[row, :length, mask[row]].sum(axis=1)
            wanted = score(log_prob, length, coverage, ALPHA, BETA)
            np.testing.assert_allclose(scores[row], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [1, 3])
def test_a_source_alone_is_translated_as_among_others(model, width):
    together = translated(model, SOURCES, width)
    rows = list(enumerate(SOURCES))
    for row, source in rows if keras.config.backend() == "tensorflow" else rows[1:2]:
        ids, lengths, scores = translated(model, source[source != PADDING][None], width)
        np.testing.assert_array_equal(lengths[0], together[1][row])
        np.testing.assert_array_equal(ids[0], together[0][row, :, : ids.shape[-1]])
        np.testing.assert_allclose(scores[0], together[2][row], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("for_cpus")
@pytest.mark.tensorflow("exports are made under TensorFlow")
def test_an_export_maps_strings_to_strings(tmp_path):
    import tensorflow as tf
    from exports import assert_keeps_no_state

    model = made(dropout=0.2)
    words = np.array(["", "<unk>", "<end>", *"abcdefghi"])
    lookup = keras.layers.StringLookup(vocabulary=list(words[2:]), mask_token="", oov_token="<unk>")
    vocabulary = tf.constant(words)

    def translate(sentences):
        ids = tf.cast(lookup(tf.strings.split(sentences)).to_tensor(), tf.int32)
        found = model.translate(ids, END, beam_width=2, max_length=MOST, excluded=[UNKNOWN])
        best = tf.where(found.ids[:, 0] == END, PADDING, found.ids[:, 0])
        return tf.strings.strip(
            tf.strings.reduce_join(tf.gather(vocabulary, best), 1, separator=" ")
        )

    sentences = tf.constant(["c a f", "b", "i h g f e"])
    expected = translate(sentences)
    assert len(set(expected.numpy())) == 3
    path = keras_moe.export_saved_model(
        model,
        tmp_path,
        signatures={"serving_default": (translate, [tf.TensorSpec([None], tf.string)])},
        track=[lookup],
    )
    served = tf.saved_model.load(path)
    assert_keeps_no_state(served)
    received = served.signatures["serving_default"](sentences=sentences)["outputs"]
    np.testing.assert_array_equal(received, expected)


def test_training_goes_on_after_translating_and_lengths_have_a_bound(model):
    weights = model.get_weights()
    _, lengths, scores = translated(model, SOURCES, 1)
    assert np.max(lengths) <= MOST
    model.compile("sgd", run_eagerly=keras.config.backend() == "tensorflow")
    target = np.array([[END, 3, 4, END]] * 4)
    logs = model.fit((SOURCES, target[:, :-1]), target[:, 1:], verbose=0).history
    assert np.isfinite(logs["loss"][0])
    # A function that is there translates by the weights that are there.
    assert np.abs(translated(model, SOURCES, 1)[2] - scores).max() > 1e-3
    # Without a bound of one's own it is twice the length of a source, and ten.
    model.softmax.bias.assign(np.where(np.arange(VOCABULARY) == END, -1e9, 0.0))
    assert model.translate(SOURCES[2:3, :1], END, beam_width=1).lengths == 12
    model.set_weights(weights)
