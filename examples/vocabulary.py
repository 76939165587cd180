"""Words and their ids.

    lookup = vocabulary.build(splits["train"], 6000)
    train = vocabulary.encode(splits["train"], lookup)      # ragged int32 [sentences, (words)]

Words are lower case, every number is "N" (as in the Penn Treebank), punctuation marks are words.
Ids: 0 padding, 1 unknown word, 2 end of sentence, then the words from frequent to rare.
"""

import collections

import keras
import tensorflow as tf
import tensorflow_text as tf_text
import word_ids
from word_ids import EOS_ID, PADDING_ID, UNKNOWN_ID, decode  # noqa: F401


def build(sentences, size):
    """Collects the most frequent words.

    Args:
        sentences: A `tf.data.Dataset` of sentences: the training part.
        size: How many ids there are at most, the three special ones included.

    Returns:
        A `keras.layers.StringLookup` from words to ids; `get_vocabulary()` lists the words by id.

    Raises:
        ValueError: `size` leaves no room for words.
    """
    room = word_ids.room_for_words(size)
    counts = collections.Counter()
    for words in _tokenized(sentences):
        counts.update(words.flat_values.numpy().tolist())
    frequent = [word.decode() for word, _ in counts.most_common(room)]
    padding, unknown, eos = word_ids.SPECIAL
    return keras.layers.StringLookup(
        vocabulary=[eos, *frequent], mask_token=padding, oov_token=unknown
    )


def encode(sentences, lookup):
    """Turns sentences into ids, once: training then does no work on strings.

    Args:
        sentences: A `tf.data.Dataset` of sentences.
        lookup: What `build` returns.

    Returns:
        An int32 `tf.RaggedTensor` [sentences, (words)], without end-of-sentence ids.
    """
    encoded = [
        words.with_flat_values(tf.cast(lookup(words.flat_values), tf.int32))
        for words in _tokenized(sentences)
    ]
    return tf.concat(encoded, axis=0)


def _tokenized(sentences):
    """Yields the words of a thousand sentences at a time, as a `tf.RaggedTensor` of strings."""
    splitter = tf_text.WhitespaceTokenizer()

    def tokenize(sentences):
        text = tf_text.case_fold_utf8(tf_text.normalize_utf8(sentences, "NFKC"))
        text = tf.strings.regex_replace(text, word_ids.APOSTROPHE, "'")
        text = tf.strings.regex_replace(text, word_ids.QUOTE, '"')
        text = tf.strings.regex_replace(text, word_ids.NUMBER, "N")
        text = tf.strings.regex_replace(text, f"({word_ids.APART})", r" \1 ")
        return splitter.tokenize(text)

    return sentences.batch(1000).map(tokenize, num_parallel_calls=tf.data.AUTOTUNE)
