"""Batches of sentences and their translations, as word-piece ids.

    pairs = pair_batching.encode(corpora["en-fr"]["train"], pieces)
    for (source, target), words in pair_batching.batches(pairs, words_per_batch=4000, seed=1):
        ...                                                 # int32 [B, S], [B, T], [B, T]

Sources end with the id of the end. The end also begins a target: from [eos, w1, ..., wn] a model
predicts the words [w1, ..., wn, eos].
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf
from batching import dataset, schedule
from vocabulary import EOS_ID


class Pairs(NamedTuple):
    """Encoded sentences and their translations.

    Attributes:
        sources: int32 `tf.RaggedTensor` [pairs, (pieces)], each with its end.
        targets: The same of the translations.
    """

    sources: tf.RaggedTensor
    targets: tf.RaggedTensor

    @property
    def lengths(self):
        """The length of the longer one of each pair, the end included."""
        return np.maximum(*(side.row_lengths().numpy() for side in self))

    def up_to(self, max_length):
        """The pairs of which neither side has more positions."""
        keep = np.flatnonzero(self.lengths <= max_length)
        return Pairs(*(tf.gather(side, keep) for side in self))


def with_end(ids):
    """Appends the id of the end to each row of a `tf.RaggedTensor`."""
    return tf.concat([ids, tf.fill([ids.nrows(), 1], EOS_ID)], axis=1)


def encode(examples, pieces):
    """Turns strings into ids, once: training then does no work on strings.

    Args:
        examples: A `tf.data.Dataset` of sources and targets.
        pieces: A `WordPieces`.

    Returns:
        `Pairs`.
    """
    encoded = examples.batch(1000).map(
        lambda *sides: tuple(with_end(pieces.tokenize(side)) for side in sides),
        num_parallel_calls=tf.data.AUTOTUNE,
    )
    return Pairs(*(tf.concat(side, axis=0) for side in zip(*encoded, strict=True)))


def together(several):
    """Puts lists of `Pairs` into one."""
    return Pairs(*(tf.concat(side, axis=0) for side in zip(*several, strict=True)))


def batches(pairs, words_per_batch, max_length=96, seed=None, epochs=1):
    """Batches pairs of like length.

    A batch has pairs whose longer sides are of like length. Nothing random comes from global state,
    so equal arguments give equal batches in equal order.

    Args:
        pairs: `Pairs`.
        words_per_batch: The most positions of a batch, padding included: pairs times the length
            of the longest side.
        max_length: The most positions of a side, its end included.
        seed: Shuffles, differently in each epoch. Default: no shuffling.
        epochs: How often the dataset passes over the pairs.

    Returns:
        A `tf.data.Dataset` of ((source, target), words) of known cardinality, where a model
        predicts the words [B, T] from source [B, S] and target [B, T], int32 all of them.

    Raises:
        ValueError: A pair is longer than `max_length`, or one of that length does not fit into
            `words_per_batch`, or there is none.
    """
    if not 0 < max_length <= words_per_batch:
        raise ValueError(
            "max_length must be between 1 and words_per_batch. Received: "
            f"max_length={max_length}, words_per_batch={words_per_batch}"
        )
    lengths = pairs.lengths
    if not 0 < lengths.max(initial=0) <= max_length:
        raise ValueError(
            f"The pairs must be some, and `up_to({max_length})` positions long. Received: "
            f"{len(lengths)} pairs of up to {lengths.max(initial=0)}"
        )

    def gather(rows):
        words = tf.gather(pairs.targets, rows)
        eos = tf.fill([tf.shape(rows)[0], 1], EOS_ID)
        target = tf.concat([eos, words[:, :-1]], axis=1)
        source = tf.gather(pairs.sources, rows)
        return (source.to_tensor(), target.to_tensor()), words.to_tensor()

    others = np.minimum(*(side.row_lengths().numpy() for side in pairs))
    rows = schedule(lengths, words_per_batch, max_length, seed, epochs, others)
    return dataset(rows, gather)
