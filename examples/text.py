"""Sentences of raw text, in three parts: training, validation, test.

    splits = text.load_dataset()                            # or text.load_files(paths)
    for sentence in splits["train"]:
        ...                                                 # a string scalar

Of a dataset of tensorflow-datasets, or of text files.
"""

import requests
import state_of_the_union
import tensorflow as tf
import tensorflow_datasets as tfds
import tensorflow_text as tf_text
from text_files import ABBREVIATION, BETWEEN_LINES, BETWEEN_SENTENCES, read_lines


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

    Args:
        paths: The files, of whose parts `text_files.read_lines` tells.

    Returns:
        What `load_dataset` returns.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged or not UTF-8, or too short for parts of it to be held out.
    """
    return {
        part: _sentences(tf.data.Dataset.from_tensor_slices(lines))
        for part, lines in read_lines(paths).items()
    }


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
    splitter = tf_text.RegexSplitter(BETWEEN_LINES)

    def split(text):
        text = tf.strings.regex_replace(text, ABBREVIATION, r"\1 ")
        text = tf.strings.regex_replace(text, BETWEEN_SENTENCES, "\\1\n\\2")
        sentences = tf.strings.strip(splitter.split([text]).flat_values)
        return tf.boolean_mask(sentences, sentences != "")

    return texts.map(split, num_parallel_calls=tf.data.AUTOTUNE).unbatch()
