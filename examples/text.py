"""Sentences of raw text, in three parts: training, validation, test.

    splits = text.load_dataset()                            # or text.load_files(paths)
    for sentence in splits["train"]:
        ...                                                 # a string scalar

Of a dataset of tensorflow-datasets, or of text files.
"""

import bz2
import gzip
import lzma
import pathlib

import numpy as np
import requests
import state_of_the_union
import tensorflow as tf
import tensorflow_datasets as tfds
import tensorflow_text as tf_text

# Regular expressions (RE2). \p{Lu} is a capital letter.
_ABBREVIATION = r"Mr|Mrs|Messrs|Ms|Dr|St|Hon|Gen|Lt|Col|Capt|Sgt|Rep|Sen|Gov|Nos?|\p{Lu}"
_END = r"""[.?!]["'”’)]*"""
_BEGIN = r"""["'“‘(]*\p{Lu}"""

_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_FILE_BLOCKS = 100
_FILE_HELD_OUT = {9: "validation", 19: "test"}  # of every 20 blocks
# The names of given parts: "book.train.txt" has "book.valid.txt" and "book.test.txt" beside it.
_PART_NAMES = {
    "train": (".train.",),
    "validation": (".valid.", ".validation."),
    "test": (".test.",),
}


def load_dataset(name=state_of_the_union.StateOfTheUnion.name, data_dir=None):
    """Loads a dataset of tensorflow-datasets.

    Args:
        name: The dataset's name there, such as `"lm1b"`; it needs a feature `text` and splits
            `train` and `test`. Without a `validation` split, 1 % of `train` becomes that. The
            default, the State of the Union addresses, needs no network.
        data_dir: Directory of the prepared data. Default: that of tensorflow-datasets.

    Returns:
        A dict from `"train"`, `"validation"` and `"test"` to a `tf.data.Dataset` of sentences
        (string scalars).

    Raises:
        ConnectionError: The data is not prepared yet and cannot be downloaded.
        ValueError: There is no such dataset, or it is not one of plain text.
    """
    builder = open_builder(name, data_dir)
    if "text" not in builder.info.features:
        raise ValueError(
            f"The dataset must have a feature 'text'. Received: {name!r}, which has "
            f"{sorted(builder.info.features)}"
        )
    parts = load_parts(builder)
    for part, examples in parts.items():
        parts[part] = examples.map(lambda example: example["text"])
        if builder.name != "lm1b":  # its examples are sentences already
            parts[part] = _sentences(parts[part])
    return parts


def open_builder(name, data_dir=None):
    """Returns the builder of a dataset of tensorflow-datasets, or raises ValueError."""
    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(
            "The dataset must be one that tensorflow-datasets knows; "
            f"`tfds.list_builders()` names them. Received: {name!r}"
        ) from error


def load_parts(builder):
    """Prepares the data of a builder, if that is not done, and returns the three parts.

    Raises:
        ConnectionError: The data is not prepared yet and cannot be downloaded.
        ValueError: Nothing in it is held out for testing.
    """
    _prepare(builder)
    if not {"train", "test"} <= set(builder.info.splits):
        raise ValueError(
            "The dataset must have splits 'train' and 'test'. Received: "
            f"{builder.name!r}, which has {sorted(builder.info.splits)}"
        )
    parts = {"train": "train", "validation": "validation", "test": "test"}
    if "validation" not in builder.info.splits:
        parts.update(train="train[1%:]", validation="train[:1%]")
    return {part: builder.as_dataset(split=split) for part, split in parts.items()}


def load_files(paths):
    """Loads UTF-8 text files with a sentence or a paragraph on each line.

    Of a file `NAME.train.txt` the files `NAME.valid.txt` (or `.validation.`) and `NAME.test.txt`
    beside it are what is held out. Of every 20 hundredths of any other file, one is held out for
    validation and one for testing: whole blocks of lines, so that few held-out lines have a
    neighbour in training. Files whose names end in `.gz`, `.bz2` or `.xz` are decompressed.

    Args:
        paths: The files.

    Returns:
        What `load_dataset` returns.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged or not UTF-8, or too short for parts of it to be held out.
    """
    parts = {part: [] for part in _PART_NAMES}
    for path in map(pathlib.Path, paths):
        for part, lines in read_parts(path).items():
            parts[part].extend(lines)
    return {
        part: _sentences(tf.data.Dataset.from_tensor_slices(lines)) for part, lines in parts.items()
    }


def read_parts(path):
    """Returns the lines of each part, as `load_files` tells."""
    (mark,) = _PART_NAMES["train"]
    if mark in path.name:
        files = {part: _part_beside(path, part) for part in _PART_NAMES}
        parts = {part: _read_lines(file) for part, file in files.items()}
        for part, lines in parts.items():
            if not lines:
                raise ValueError(f"The file must hold text. Received: {str(files[part])!r}")
        return parts
    lines = _read_lines(path)
    if len(lines) < _FILE_BLOCKS:
        raise ValueError(
            f"The text file must have at least {_FILE_BLOCKS} lines of text, a sentence or a "
            f"paragraph on each, for parts of it to be held out. Received: {str(path)!r} with "
            f"{len(lines)}"
        )
    parts = {part: [] for part in _PART_NAMES}
    for i, block in enumerate(np.array_split(np.array(lines, object), _FILE_BLOCKS)):
        parts[_FILE_HELD_OUT.get(i % 20, "train")].extend(block)
    return parts


def _part_beside(path, part):
    """The file of a part, given that of the training part."""
    (mark,) = _PART_NAMES["train"]
    before, after = path.name.rsplit(mark, 1)
    names = [before + name + after for name in _PART_NAMES[part]]
    for name in names:
        if path.with_name(name).is_file():
            return path.with_name(name)
    return path.with_name(names[0])  # It is missing.


def _read_lines(path):
    """Returns the lines of a file that hold more than spaces."""
    if not path.is_file():
        raise FileNotFoundError(f"The text file must exist. Received: {str(path)!r}")
    try:
        with _OPENERS.get(path.suffix, open)(path, "rb") as file:
            lines = file.read().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            "The text file must be UTF-8; `iconv -f ISO-8859-1 -t UTF-8` converts a Latin-1 one. "
            f"Received: {str(path)!r}, byte {error.object[error.start]:#04x} at {error.start}"
        ) from error
    except (EOFError, lzma.LZMAError, OSError) as error:
        raise ValueError(
            "The text file must be readable, whole and compressed as its name says. Received: "
            f"{str(path)!r}: {error}"
        ) from error
    return [line for line in lines if line.strip()]


def _prepare(builder):
    """Prepares the data of a builder unless that is done, failing at once without a network."""
    url = next((url for url in builder.url_infos or () if url.startswith("http")), None)
    if url and not builder.data_path.exists():
        # tensorflow-datasets retries for minutes before it gives up, so knock first.
        try:
            with requests.get(url, stream=True, timeout=5) as response:
                response.raise_for_status()
        except requests.RequestException as error:
            raise ConnectionError(
                f"The dataset {builder.name!r} cannot be downloaded, and {builder.data_path} does "
                "not hold it. Check the network, copy that directory from a machine that has it, "
                f"or take another text. Received: {error}"
            ) from error
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )


def _sentences(texts):
    """Splits texts, whose paragraphs stand on lines of their own, into sentences."""
    splitter = tf_text.RegexSplitter(r"\s*\n\s*")

    def split(text):
        # The full stop of an abbreviation or an initial ends no sentence: "Mr. Polk", "U.S. Navy".
        text = tf.strings.regex_replace(text, rf"\b({_ABBREVIATION})\.[ \t]+", r"\1 ")
        text = tf.strings.regex_replace(text, rf"({_END})\s+({_BEGIN})", "\\1\n\\2")
        sentences = tf.strings.strip(splitter.split([text]).flat_values)
        return tf.boolean_mask(sentences, sentences != "")

    return texts.map(split, num_parallel_calls=tf.data.AUTOTUNE).unbatch()
