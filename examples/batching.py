"""Batches of word ids for a language model.

    for inputs, targets in batching.batches(train, words_per_batch=4000, seed=1, epochs=4):
        ...                                                 # both int32 [B, L]

The end of one sentence also begins the next: from inputs [eos, w1, ..., wn] a model predicts the
targets [w1, ..., wn, eos].
"""

import keras
import numpy as np
from word_ids import EOS_ID

# With JAX each shape is compiled anew, so there are few, with more padding in them.
STATIC = keras.config.backend() == "jax"
_BUCKET_WIDTH = 16 if STATIC else 4


def batches(sentences, words_per_batch, max_length=64, seed=None, epochs=1):
    """Batches sentences of like length.

    Every word and every end of sentence is a target exactly once per epoch: a sentence too long
    is cut into even pieces, each of which starts from the last word of the one before. Nothing
    random comes from global state, so equal arguments give equal batches in equal order. With JAX
    they are other ones, of the same words: rows are of like length as far as 16 lengths go.

    Args:
        sentences: What `vocabulary.encode` or `plain_vocabulary.encode` returns.
        words_per_batch: The most positions B * L of a batch, padding included. With JAX so many
            as far as L divides them, filled with sentences of padding alone.
        max_length: The most positions L of a sentence, its end included.
        seed: Shuffles, differently in each epoch. Default: no shuffling.
        epochs: How often the dataset passes over the sentences.

    Returns:
        A `tf.data.Dataset` of pairs (inputs, targets), both int32 [B, L], of known cardinality.
        With JAX a `keras.utils.PyDataset` of arrays, of the same length.

    Raises:
        ValueError: A sentence of `max_length` does not fit into `words_per_batch`.
    """
    if not 0 < max_length <= words_per_batch:
        raise ValueError(
            "max_length must be between 1 and words_per_batch. Received: "
            f"max_length={max_length}, words_per_batch={words_per_batch}"
        )
    words = np.asarray(sentences.flat_values)
    starts_and_end = np.concatenate([[0], np.cumsum(sentences.row_lengths())])
    lengths = _even_pieces(np.diff(starts_and_end) + 1, max_length)
    flat = [
        np.insert(words, places, EOS_ID) for places in (starts_and_end[:-1], starts_and_end[1:])
    ]
    rows = schedule(lengths, words_per_batch, max_length, seed, epochs)
    if STATIC:
        return Filled(flat, lengths, rows, words_per_batch, max_length)

    import tensorflow as tf

    inputs, targets = (tf.RaggedTensor.from_row_lengths(ids, lengths) for ids in flat)
    return dataset(
        rows, lambda rows: tuple(tf.gather(x, rows).to_tensor() for x in (inputs, targets))
    )


class Filled(keras.utils.PyDataset):
    """Batches of few shapes, each with as many rows as it has room for.

    Args:
        flat: The inputs and the targets of all rows, one behind the other.
        lengths: The lengths of the rows.
        rows: List with the rows of each batch.
        words_per_batch: The most positions of a batch.
        max_length: The most positions of a row.
    """

    def __init__(self, flat, lengths, rows, words_per_batch, max_length):
        super().__init__()
        self.flat, self.lengths, self.rows = flat, lengths, rows
        self.starts = np.cumsum(lengths) - lengths
        self.words_per_batch, self.max_length = words_per_batch, max_length

    def __len__(self):
        """The number of batches."""
        return len(self.rows)

    def skip(self, number):
        """The batches behind so many, as `tf.data.Dataset.skip`."""
        rest = self.rows[number:]
        return Filled(self.flat, self.lengths, rest, self.words_per_batch, self.max_length)

    def __getitem__(self, index):
        """A batch: inputs and targets."""
        rows = self.rows[index]
        longest = -(-self.lengths[rows].max() // _BUCKET_WIDTH) * _BUCKET_WIDTH
        longest = min(longest, self.max_length)
        place = np.arange(longest)
        is_word = place < self.lengths[rows, None]
        words = (self.starts[rows, None] + place)[is_word]
        batch = np.zeros((2, self.words_per_batch // longest, longest), "int32")
        for padded, ids in zip(batch, self.flat, strict=True):
            padded[: len(rows)][is_word] = ids[words]
        return tuple(batch)


def dataset(rows, gather):
    """A `tf.data.Dataset` of what `gather` makes of the rows of each batch."""
    import tensorflow as tf

    rows = tf.RaggedTensor.from_row_lengths(np.concatenate(rows), [len(row) for row in rows])
    batches = tf.data.Dataset.from_tensor_slices(rows).map(gather)
    return batches.prefetch(tf.data.AUTOTUNE)


def schedule(lengths, words_per_batch, max_length, seed, epochs, others=None):
    """Returns the rows of each batch, a list of arrays.

    Bucketed by length as `tf.data.Dataset.bucket_by_sequence_length` does, but before training
    instead of row by row during it, and without small batches at the end. Within a bucket the rows
    of a batch are also alike in `others`, lengths of something else.
    """
    longest = np.array([*range(_BUCKET_WIDTH, max_length, _BUCKET_WIDTH), max_length])
    bucket = np.searchsorted(longest, lengths)
    rows_per_batch = _even_pieces(
        np.bincount(bucket, minlength=len(longest)), words_per_batch // longest
    )
    other = np.zeros_like(bucket) if others is None else others // _BUCKET_WIDTH
    random = np.random.default_rng(seed)
    steps = []
    for _ in range(epochs):
        rows = np.arange(len(lengths)) if seed is None else random.permutation(len(lengths))
        rows = rows[np.lexsort((other[rows], bucket[rows]))]  # stable
        epoch = np.split(rows, np.cumsum(rows_per_batch)[:-1])
        if seed is not None:
            random.shuffle(epoch)
        steps.extend(epoch)
    return steps


def _even_pieces(lengths, max_length):
    """Cuts things of the given lengths into even pieces and returns the pieces' lengths."""
    num_pieces = -(-lengths // max_length)
    first_piece = np.cumsum(num_pieces) - num_pieces
    lengths, num_pieces, first_piece = (
        np.repeat(x, num_pieces) for x in (lengths, num_pieces, first_piece)
    )
    piece = np.arange(len(lengths)) - first_piece  # its number within the sentence
    return lengths * (piece + 1) // num_pieces - lengths * piece // num_pieces
