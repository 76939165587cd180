"""Word pieces: any string to ids and back, and BLEU of what comes back."""

import django_catalogs
import numpy as np
import pytest
import tensorflow as tf
import vocabulary
import word_pieces
from bleu import bleu, signature
from word_pieces import WordPieces


@pytest.fixture(scope="module")
def sentences():
    """Those of two languages."""
    return [
        text
        for language in ("de", "fr")
        for pair in django_catalogs.messages(language)[:300]
        for text in pair
    ]


@pytest.fixture(scope="module")
def model(sentences):
    return word_pieces.learn(sentences, 800, words=["<2de>", "<2fr>"])


@pytest.fixture(scope="module")
def pieces(model):
    return WordPieces(model)


def test_some_ids_are_shown_as_text(pieces):
    (ids,) = pieces.tokenize(["été 🙂"]).to_list()
    # An end and padding are nothing, and of four bytes the first alone is no character.
    assert pieces.text([*ids, vocabulary.EOS_ID, vocabulary.PADDING_ID]) == "été 🙂"
    assert pieces.text(ids[:-3]) == "été \ufffd"
    assert pieces.text([]) == ""


def restored(pieces, strings):
    return [text.decode() for text in pieces.detokenize(pieces.tokenize(strings)).numpy()]


def test_text_of_any_language_comes_back(pieces):
    for language in ("fr", "el", "ar", "ja"):  # two of them unseen, in other scripts
        for strings in zip(*django_catalogs.messages(language)[:200], strict=True):
            assert restored(pieces, strings) == list(strings)


@pytest.mark.parametrize(
    "text, back",
    [
        ("", ""),
        ("“%(value)s” isn’t (a) 'number': 3,5 €…", "“%(value)s” isn’t (a) 'number': 3,5 €…"),
        ("Ça\u00a0va\u202f?", "Ça\u00a0va\u202f?"),  # spaces that mustn't break stay
        (" two  spaces,\ta tab\nand a line\r\n", "two spaces, a tab and a line"),
        ("e\u0301te\u0301", "été"),  # accents apart from their letters join them
        ("</s> <unk> <0x41>", "</s> <unk> <0x41>"),  # no special ids
        ("🙂 a\u2581b", "🙂 a b"),
    ],
)
def test_what_comes_back(pieces, text, back):
    assert restored(pieces, [text]) == [back]
    special = [vocabulary.PADDING_ID, vocabulary.UNKNOWN_ID, vocabulary.EOS_ID]
    assert not set(pieces.tokenize([text]).flat_values.numpy()) & set(special)


def test_ids(pieces):
    assert pieces.size == 800
    assert pieces.names([*range(5), 7]) == ["<pad>", "<unk>", "</s>", "<2de>", "<2fr>", "<0x02>"]
    ids = pieces.tokenize(["<2fr> Yes", "in <2de>", "a<2de>"])
    assert ids.dtype == tf.int32
    rows = ids.to_list()
    assert rows[0][0] == 4 and rows[1][-1] == 3
    assert 3 not in rows[2]  # no word of its own


def test_padding_and_ends_leave_no_trace(pieces):
    ids = pieces.tokenize(["Yes, no.", "No"])
    padded = tf.concat([ids, [[2], [2]]], axis=1).to_tensor()
    assert padded.shape[0] == 2 and np.any(padded == vocabulary.PADDING_ID)
    assert [text.decode() for text in pieces.detokenize(padded).numpy()] == ["Yes, no.", "No"]
    # Ids that no string has: unknown, and bytes that are no character.
    assert pieces.detokenize([[1], [5 + 0xC3]]).numpy()[0] == b""


def test_frequent_words_are_one_piece(pieces, sentences):
    ids = pieces.tokenize(sentences)
    assert len(ids.flat_values) < 0.6 * sum(map(len, sentences))  # two characters or so
    assert len(pieces.tokenize(["the"]).to_list()[0]) == 1


def test_a_new_seed_does_no_harm(pieces):
    in_graph = tf.function(pieces.tokenize, input_signature=[tf.TensorSpec([None], tf.string)])
    before = [f(["Yes, no."]).to_list() for f in (pieces.tokenize, in_graph)]
    tf.random.set_seed(1)  # It empties TensorFlow's cache of kernels.
    assert [f(["Yes, no."]).to_list() for f in (pieces.tokenize, in_graph)] == before
    assert restored(pieces, ["Yes, no."]) == ["Yes, no."]


def test_equal_sentences_give_equal_vocabularies(sentences, model):
    assert word_pieces.learn(sentences, 800, words=["<2de>", "<2fr>"]) == model


@pytest.mark.parametrize("size", [270, 100_000])
def test_a_size_that_does_not_suit_the_text_is_refused(sentences, size):
    with pytest.raises(ValueError, match=f"a size between.*Received: size={size}; .*size"):
        word_pieces.learn(sentences, size)


def test_no_sentences_are_refused():
    with pytest.raises(ValueError, match="There must be sentences.*Received: size=500"):
        word_pieces.learn([], 500)


# BLEU


def test_bleu_counts_runs_of_up_to_four_words():
    # Of 8 words 7 are in the reference, of 7 pairs 5, of 6 triples 4, of 5 fours 3:
    # 7/8 · 5/7 · 4/6 · 3/5 = 1/4, and its fourth root is √(1/2). It isn't shorter than the
    # reference, which would count against it. A full stop is a word without a space, too.
    score = bleu(["the cat sat on the mat today."], ["the cat sat on the mat ."])
    np.testing.assert_allclose(score, 100 * np.sqrt(0.5))


def test_bleu_of_a_translation_too_short():
    # All of the four words are right, but the reference has seven: exp(1 - 7/4).
    score = bleu(["the cat sat on"], ["the cat sat on the mat."])
    np.testing.assert_allclose(score, 100 * np.exp(1 - 7 / 4))


def test_bleu_is_that_of_the_corpus_with_case_and_without_smoothing():
    # Two sentences: the counts add up, 4 + 4 of 8 words, then 6 of 6, 4 of 4, 2 of 2.
    assert bleu(["a b c d", "e f g h"], ["a b c d", "e f g h"]) == pytest.approx(100)
    # 4 of 8 words, 3 of 6 pairs, 2 of 4 triples, 1 of 2 fours: half of each.
    assert bleu(["a b c d", "E F G H"], ["a b c d", "e f g h"]) == pytest.approx(50)
    assert bleu(["a b c x"], ["a b c d"]) == 0  # no run of four
    assert "tok:13a" in signature() and "case:mixed" in signature()


@pytest.mark.parametrize("number", [0, 2])
def test_bleu_needs_a_reference_for_each_translation(number):
    with pytest.raises(ValueError, match=f"Received: {number} translations, 0 references"):
        bleu(["a"] * number, [])
