"""`TranslationModel.translate`: step by step what the whole model computes at once."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import assert_keeps_no_state
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
    rng = np.random.default_rng(0)
    for weight in model.trainable_weights:
        weight.assign(0.7 * rng.normal(size=weight.shape))
    if gating == "strictly_balanced":
        for middle in middles:
            # Some examples are above several thresholds, some above none.
            middle.gating.thresholds.assign([0.2, 0.4, 0.3, 0.6])
    return model


@pytest.fixture(scope="module", params=["noisy_top_k", "strictly_balanced"])
def model(request):
    return made(request.param)


def translated(model, sources, **options):
    """Translates in a graph that knows no sizes."""
    options = {"max_length": MOST, "excluded": [UNKNOWN], **options}
    signature = [tf.TensorSpec([None, None], tf.int32)]
    translate = tf.function(
        lambda source: model.translate(source, END, **options),
        input_signature=signature,
        autograph=False,
    )
    return [numpy(part) for part in translate(tf.constant(sources, tf.int32))]


def words_of(source):
    return source[source != PADDING][None]


def test_width_1_is_greedy_decoding_by_the_whole_model(model):
    ids, lengths, _ = translated(model, SOURCES, beam_width=1)
    ended = []
    for row, source in enumerate(SOURCES):
        words = [END]
        while len(words) <= MOST and (len(words) == 1 or words[-1] != END):
            log_probs = numpy(model((words_of(source), np.array([words]))))[0, -1]
            log_probs[[PADDING, UNKNOWN]] = -np.inf
            words.append(int(np.argmax(log_probs)))
        ended.append(words[-1] == END)
        np.testing.assert_array_equal(ids[row, 0, : lengths[row, 0]], words[1:])
        assert np.all(ids[row, 0, lengths[row, 0] :] == PADDING)
    assert len({tuple(row) for row in ids[:, 0]}) == len(SOURCES)  # Sources make a difference.
    assert not all(ended) or len(set(lengths[:, 0])) > 1


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.0), (0.6, 0.3)])
def test_scores_are_those_of_the_whole_model(model, alpha, beta):
    found = translated(model, SOURCES, beam_width=3, length_penalty=alpha, coverage_penalty=beta)
    for row, source in enumerate(SOURCES):
        for ids, length, received in zip(*(part[row] for part in found), strict=True):
            words, source_words = ids[:length], words_of(source)
            before = np.concatenate([[END], words[:-1]])[None]
            log_probs = numpy(model((source_words, before)))[0]
            _, attention = model.attention_lstm(
                model.target_embedding(before),
                model.encode(source_words),
                return_attention_scores=True,
            )
            log_prob = log_probs[np.arange(length), words].sum()
            wanted = score(log_prob, length, numpy(attention)[0].sum(axis=0), alpha, beta)
            np.testing.assert_allclose(received, wanted, rtol=1e-4, atol=1e-4)
        scores = found[2][row]
        assert np.all(np.diff(scores) <= 0) or not np.all(found[0][row] == END, axis=-1).any()


@pytest.mark.parametrize("width", [1, 4])
def test_a_source_alone_is_translated_as_among_others(model, width):
    ids, lengths, scores = translated(model, SOURCES, beam_width=width, max_length=None)
    for row, source in enumerate(SOURCES):
        alone = translated(model, words_of(source), beam_width=width, max_length=None)
        np.testing.assert_array_equal(alone[1][0], lengths[row])
        most = alone[0].shape[-1]
        np.testing.assert_array_equal(alone[0][0], ids[row, :, :most])
        np.testing.assert_allclose(alone[2][0], scores[row], rtol=1e-4, atol=1e-4)
        assert most <= 2 * words_of(source).size + 10


def test_an_export_maps_strings_to_strings(tmp_path):
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


def test_training_goes_on_after_translating():
    model = made()
    model.compile("sgd")
    translated(model, SOURCES, beam_width=2)
    target = np.array([[END, 3, 4, END]] * 4)
    logs = model.fit((SOURCES, target[:, :-1]), target[:, 1:], verbose=0).history
    assert np.isfinite(logs["loss"][0])
