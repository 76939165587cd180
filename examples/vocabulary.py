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

PADDING_ID, UNKNOWN_ID, EOS_ID = range(3)
_SPECIAL = ("", "<unk>", "<eos>")  # no words of a text: the tokeniser sets "<" and ">" apart

# Regular expressions (RE2). \p{L} is a letter.
_NUMBER = r"\d[\d,.]*\d|\d"
# Words without a space around them: "u.s", "'s", a run of dashes or dots, any other mark.
_APART = r"\b\p{L}(?:\.\p{L})+\b|'(?:s|t|d|m|ll|re|ve)\b|[-–—]+|\.+|[^\p{L}\s]"


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
    if size <= len(_SPECIAL):
        raise ValueError(
            f"size must be above {len(_SPECIAL)}, the number of special ids. Received: {size}"
        )
    counts = collections.Counter()
    for words in _tokenized(sentences):
        counts.update(words.flat_values.numpy().tolist())
    frequent = [word.decode() for word, _ in counts.most_common(size - len(_SPECIAL))]
    padding, unknown, eos = _SPECIAL
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


def decode(ids, lookup):
    """Turns ids [B, L], an array, lists or ragged, into B strings, without the padding."""
    vocabulary = lookup.get_vocabulary()
    return [" ".join(vocabulary[i] for i in row if i != PADDING_ID) for row in ids]


def _tokenized(sentences):
    """Yields the words of a thousand sentences at a time, as a `tf.RaggedTensor` of strings."""
    splitter = tf_text.WhitespaceTokenizer()

    def tokenize(sentences):
        text = tf_text.case_fold_utf8(tf_text.normalize_utf8(sentences, "NFKC"))
        text = tf.strings.regex_replace(text, "[‘’]", "'")
        text = tf.strings.regex_replace(text, "[“”]", '"')
        text = tf.strings.regex_replace(text, _NUMBER, "N")
        text = tf.strings.regex_replace(text, f"({_APART})", r" \1 ")
        return splitter.tokenize(text)

    return sentences.batch(1000).map(tokenize, num_parallel_calls=tf.data.AUTOTUNE)
