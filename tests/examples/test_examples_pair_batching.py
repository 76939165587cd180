"""Batches of pairs: each pair once, both sides of like length, the same ones for the same seed."""

import numpy as np
import pair_batching
import pytest
import tensorflow as tf
from pair_batching import Pairs


def ragged(rows):
    return tf.ragged.constant(rows, tf.int32, ragged_rank=1)


@pytest.fixture(scope="module")
def pairs():
    """2,000 pairs of two sides that are alike in length; every id tells pair and place."""
    random = np.random.default_rng(0)
    sources = random.integers(1, 40, 2000)
    targets = np.clip(sources + random.integers(-9, 10, 2000), 1, 40)
    rows = [
        [[100 * i + j + 3 for j in range(n - 1)] + [2] for i, n in enumerate(lengths)]
        for lengths in (sources, targets)
    ]
    return Pairs(*map(ragged, rows))


def as_lists(dataset):
    return [[x.numpy().tolist() for x in tf.nest.flatten(batch)] for batch in dataset]


def unpadded(rows):
    return [[i for i in row if i != 0] for row in rows]


def test_targets_begin_with_the_end_of_the_one_before():
    pairs = Pairs(ragged([[5, 6, 2], [7, 2]]), ragged([[8, 2], [9, 10, 11, 2]]))
    # Longer sides of 3 and 4 positions, both in the bucket of up to 4: 8 positions hold both.
    assert as_lists(pair_batching.batches(pairs, words_per_batch=8, max_length=8)) == [
        [[[5, 6, 2], [7, 2, 0]], [[2, 8, 0, 0], [2, 9, 10, 11]], [[8, 2, 0, 0], [9, 10, 11, 2]]]
    ]


def test_every_pair_comes_once_per_epoch(pairs):
    seen = []
    for (source, target), words in pair_batching.batches(pairs, 1024, 40, seed=3, epochs=2):
        assert source.dtype == target.dtype == words.dtype == tf.int32
        source, target, words = (unpadded(x.numpy().tolist()) for x in (source, target, words))
        assert target == [[2, *row[:-1]] for row in words]
        seen.extend(zip(source, words, strict=True))
    expected = list(zip(pairs.sources.to_list(), pairs.targets.to_list(), strict=True))
    assert sorted(seen) == sorted(expected + expected)
    assert seen[:2000] != seen[2000:]


def test_batches_are_full_of_pairs_of_like_length(pairs):
    dataset = pair_batching.batches(pairs, 1024, 40, seed=3)
    used = {"source": [], "words": []}
    sizes = []
    for (source, _), words in dataset:
        sizes.append(len(source) * max(source.shape[1], words.shape[1]))
        for name, side in (("source", source), ("words", words)):
            used[name].append(np.count_nonzero(side) / side.shape.num_elements())
    assert len(dataset) == len(sizes)
    assert max(sizes) <= 1024
    assert np.mean(sizes) > 0.85 * 1024
    assert np.mean(used["source"]) > 0.8 and np.mean(used["words"]) > 0.8


def test_same_seed_gives_the_same_batches(pairs):
    dataset = pair_batching.batches(pairs, 2048, seed=3)
    first = as_lists(dataset)
    assert as_lists(dataset) == first
    tf.random.set_seed(99)
    assert as_lists(pair_batching.batches(pairs, 2048, seed=3)) == first
    assert as_lists(pair_batching.batches(pairs, 2048, seed=4)) != first


def test_without_a_seed_pairs_of_a_length_stay_in_order():
    pairs = Pairs(*[ragged([[i, 2] for i in range(3, 103)])] * 2)
    batches = pair_batching.batches(pairs, 8, max_length=8)
    assert [row[0] for _, words in batches for row in words.numpy()] == list(range(3, 103))


def test_long_pairs_can_be_left_out():
    pairs = Pairs(ragged([[5, 6, 2], [7, 2], [8, 2]]), ragged([[8, 2], [9, 10, 2], [11, 2]]))
    assert pairs.lengths.tolist() == [3, 3, 2]
    short = pairs.up_to(2)
    assert [side.to_list() for side in short] == [[[8, 2]], [[11, 2]]]
    both = pair_batching.together([short, short])
    assert [side.to_list() for side in both] == [[[8, 2]] * 2, [[11, 2]] * 2]


@pytest.mark.parametrize("most, received", [(2, "2 pairs of up to 3"), (1, "0 pairs of up to 0")])
def test_pairs_too_long_and_no_pairs_are_refused(most, received):
    pairs = Pairs(ragged([[5, 6, 2], [7, 2]]), ragged([[8, 2], [9, 10, 2]]))
    pairs = pairs.up_to(1) if most == 1 else pairs
    with pytest.raises(ValueError, match=f"up_to.{most}.. positions long. Received: {received}"):
        pair_batching.batches(pairs, 8, max_length=most)


@pytest.mark.parametrize("max_length", [0, 65])
def test_impossible_max_length_is_refused(pairs, max_length):
    with pytest.raises(ValueError, match=f"max_length must be.*Received: max_length={max_length}"):
        pair_batching.batches(pairs, 64, max_length=max_length)
