"""What `vocabulary` does, without TensorFlow: the same words, the same ids.

lookup = plain_vocabulary.build(splits["train"], 6000)
train = plain_vocabulary.encode(splits["train"], lookup)    # `Sentences`
"""

import array
import collections
import functools
import itertools
import unicodedata

import numpy as np
import word_ids
from plain_text import compile_re2
from word_ids import EOS_ID, PADDING_ID, UNKNOWN_ID, decode  # noqa: F401

# Unicode's case folding leaves out what is not to be seen, such as soft hyphens.
_UNSEEN = (
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


class Lookup:
    """From words to ids.

    Args:
        words: List of words, from frequent to rare.
    """

    def __init__(self, words):
        self._vocabulary = [*word_ids.SPECIAL, *words]
        self.ids = {word: i for i, word in enumerate(self._vocabulary)}

    def get_vocabulary(self):
        """The words by id."""
        return self._vocabulary


class Sentences:
    """Ids of sentences: of what a `tf.RaggedTensor` has, what the scripts need.

    Args:
        flat_values: The ids of all sentences, one behind the other.
        lengths: How many ids each has.
    """

    def __init__(self, flat_values, lengths):
        self.flat_values = np.asarray(flat_values, "int32")
        self._lengths = np.asarray(lengths, "int64")

    def nrows(self):
        """How many sentences there are."""
        return len(self._lengths)

    def row_lengths(self):
        """How many ids each has."""
        return self._lengths

    def __getitem__(self, rows):
        """The sentences of a slice."""
        lists = self.to_list()[rows]
        return Sentences([i for ids in lists for i in ids], [len(ids) for ids in lists])

    def to_list(self):
        """List of lists of ids."""
        ends = np.cumsum(self._lengths)
        return [ids.tolist() for ids in np.split(self.flat_values, ends[:-1])] if len(ends) else []


def build(sentences, size):
    """Collects the most frequent words.

    Args:
        sentences: What yields strings: the training part.
        size: How many ids there are at most, the three special ones included.

    Returns:
        A `Lookup`.

    Raises:
        ValueError: `size` leaves no room for words.
    """
    room = word_ids.room_for_words(size)
    counts = collections.Counter(itertools.chain.from_iterable(map(tokenize, sentences)))
    return Lookup([word for word, _ in counts.most_common(room)])


def encode(sentences, lookup):
    """Turns sentences into ids, once: training then does no work on strings.

    Args:
        sentences: What yields strings.
        lookup: What `build` returns.

    Returns:
        `Sentences`, without end-of-sentence ids.
    """
    flat_values, lengths = array.array("i"), array.array("q")
    for words in map(tokenize, sentences):
        flat_values.extend(lookup.ids.get(word, UNKNOWN_ID) for word in words)
        lengths.append(len(words))
    return Sentences(flat_values, lengths)


def tokenize(sentence):
    """The words of a sentence."""
    text = unicodedata.normalize("NFKC", sentence).casefold()
    text = unicodedata.normalize("NFKC", text)
    for pattern, replacement in _replacements():
        text = pattern.sub(replacement, text)
    return text.split()


@functools.cache
def _replacements():
    """Pairs of a pattern and what takes its place, one after the other."""
    pairs = (
        (_UNSEEN, ""),
        (word_ids.APOSTROPHE, "'"),
        (word_ids.QUOTE, '"'),
        (word_ids.NUMBER, "N"),
        (f"({word_ids.APART})", r" \1 "),
    )
    return [(compile_re2(pattern), replacement) for pattern, replacement in pairs]
