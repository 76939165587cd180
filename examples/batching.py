"""Batches of word ids for a language model.

    for inputs, targets in batching.batches(train, words_per_batch=4000, seed=1, epochs=4):
        ...                                                 # both int32 [B, L]

The end of one sentence also begins the next: from inputs [eos, w1, ..., wn] a model predicts the
targets [w1, ..., wn, eos].
"""

import keras
import numpy as np
import tensorflow as tf
from vocabulary import EOS_ID

# With JAX each shape is compiled anew, so there are few, with more padding in them.
STATIC = keras.config.backend() == "jax"
_BUCKET_WIDTH = 16 if STATIC else 4


def batches(sentences, words_per_batch, max_length=64, seed=None, epochs=1):
    """Batches sentences of like length.

    Every word and every end of sentence is a target exactly once per epoch: a sentence too long
    is cut into even pieces, each of which starts from the last word of the one before. Nothing
    random comes from global state, so equal arguments give equal batches in equal order.

    Args:
        sentences: What `vocabulary.encode` returns.
        words_per_batch: The most positions B * L of a batch, padding included. With JAX so many
            as far as L divides them, filled with sentences of padding alone.
        max_length: The most positions L of a sentence, its end included.
        seed: Shuffles, differently in each epoch. Default: no shuffling.
        epochs: How often the dataset passes over the sentences.

    Returns:
        A `tf.data.Dataset` of pairs (inputs, targets), both int32 [B, L], of known cardinality.

    Raises:
        ValueError: A sentence of `max_length` does not fit into `words_per_batch`.
    """
    if not 0 < max_length <= words_per_batch:
        raise ValueError(
            "max_length must be between 1 and words_per_batch. Received: "
            f"max_length={max_length}, words_per_batch={words_per_batch}"
        )
    eos = tf.fill([sentences.nrows(), 1], EOS_ID)
    lengths = _even_pieces(sentences.row_lengths().numpy() + 1, max_length)
    inputs, targets = (
        tf.RaggedTensor.from_row_lengths(tf.concat(parts, axis=1).flat_values, lengths)
        for parts in ([eos, sentences], [sentences, eos])
    )

    rows = schedule(lengths, words_per_batch, max_length, seed, epochs)

    def padded(words):
        if not STATIC:
            return words.to_tensor()
        longest = tf.reduce_max(words.row_lengths())
        longest = tf.minimum(-(-longest // _BUCKET_WIDTH) * _BUCKET_WIDTH, max_length)
        return words.to_tensor(shape=[words_per_batch // longest, longest])

    dataset = tf.data.Dataset.from_tensor_slices(rows).map(
        lambda rows: tuple(padded(tf.gather(words, rows)) for words in (inputs, targets))
    )
    return dataset.prefetch(tf.data.AUTOTUNE)


def schedule(lengths, words_per_batch, max_length, seed, epochs, others=None):
    """Returns the rows of each batch, a `tf.RaggedTensor` [steps, (B)].

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
    return tf.RaggedTensor.from_row_lengths(np.concatenate(steps), [len(rows) for rows in steps])


def _even_pieces(lengths, max_length):
    """Cuts things of the given lengths into even pieces and returns the pieces' lengths."""
    num_pieces = -(-lengths // max_length)
    first_piece = np.cumsum(num_pieces) - num_pieces
    lengths, num_pieces, first_piece = (
        np.repeat(x, num_pieces) for x in (lengths, num_pieces, first_piece)
    )
    piece = np.arange(len(lengths)) - first_piece  # its number within the sentence
    return lengths * (piece + 1) // num_pieces - lengths * piece // num_pieces
