"""What `text` reads, without TensorFlow: the same sentences in the same order.

splits = plain_text.load_dataset()                      # or plain_text.load_files(paths)
for sentence in splits["train"]:
...                                                 # a string
"""

import functools
import hashlib
import itertools
import re
import sys
import unicodedata

import addresses
from text_files import ABBREVIATION, BETWEEN_LINES, BETWEEN_SENTENCES, read_lines


def load_dataset(name=addresses.NAME):
    """Loads the State of the Union addresses, or, by TensorFlow, another dataset.

    Args:
        name: As of `text.load_dataset`.

    Returns:
        A dict from `"train"`, `"validation"` and `"test"` to something that yields sentences,
        strings, as often as it is read.

    Raises:
        ValueError: The dataset is another one, and TensorFlow isn't installed.
    """
    if name == addresses.NAME:
        return {part: list(_sentences(_shuffled_addresses(part))) for part in addresses.PARTS}
    try:
        import text
    except ImportError as error:
        raise ValueError(
            "The datasets of tensorflow-datasets need TensorFlow, tensorflow-datasets and "
            f"tensorflow-text: install them, or take `--text` FILE or {addresses.NAME!r}. "
            f"Received: {name!r}, and {error}"
        ) from error
    return {part: _Decoded(sentences) for part, sentences in text.load_dataset(name).items()}


def load_files(paths):
    """Loads text files, as `text.load_files` does."""
    return {part: list(_sentences(lines)) for part, lines in read_lines(paths).items()}


def compile_re2(pattern):
    """Compiles a regular expression of RE2, whose spaces, digits and words are those of ASCII."""
    for category in ("Lu", "L"):
        if f"\\p{{{category}}}" in pattern:
            letters = _letters(category)
            pattern = pattern.replace(f"[^\\p{{{category}}}", f"[^{letters}")
            pattern = pattern.replace(f"\\p{{{category}}}", f"[{letters}]")
    return re.compile(pattern, re.ASCII)


@functools.cache
def _letters(category):
    """The characters of a category of Unicode, in ranges."""
    points = range(sys.maxunicode + 1)
    points = [i for i in points if unicodedata.category(chr(i)).startswith(category)]
    runs = itertools.groupby(enumerate(points), lambda pair: pair[1] - pair[0])
    runs = ([point for _, point in run] for _, run in runs)
    return "".join(f"{chr(run[0])}-{chr(run[-1])}" for run in runs)


def _sentences(texts):
    """Yields the sentences of texts, whose paragraphs stand on lines of their own."""
    abbreviation, between = map(compile_re2, (ABBREVIATION, BETWEEN_SENTENCES))
    between_lines = compile_re2(BETWEEN_LINES)
    for text in texts:
        text = between.sub("\\1\n\\2", abbreviation.sub(r"\1 ", text))
        yield from filter(None, (part.strip(" \t\n\v\f\r") for part in between_lines.split(text)))


def _shuffled_addresses(part):
    """The addresses of a part, in the order in which tensorflow-datasets writes them."""
    texts = {address.fileid: addresses.clean(address.text) for address in addresses.of_part(part)}
    return [texts[key] for key in sorted(texts, key=lambda key: _hashed(part + key))]


def _hashed(key):
    return hashlib.md5(key.encode(), usedforsecurity=False).hexdigest()


class _Decoded:
    """The strings of a `tf.data.Dataset`."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        return (sentence.decode() for sentence in self.dataset.as_numpy_iterator())
