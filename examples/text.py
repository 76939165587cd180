"""From raw text to batches of word ids for a language model.

    splits = text.load_dataset()                            # or text.load_file(path)
    lookup = text.build_vocabulary(splits["train"], 6000)
    train = text.encode(splits["train"], lookup)
    for inputs, targets in text.batches(train, words_per_batch=4000, seed=1, epochs=4):
        ...                                                 # both int32 [B, L]

Words are lower case, every number is "N" (as in the Penn Treebank), punctuation marks are words.
Ids: 0 padding, 1 unknown word, 2 end of sentence, then the words from frequent to rare. The end
of one sentence also begins the next: from inputs [eos, w1, ..., wn] a model predicts the targets
[w1, ..., wn, eos].
"""

import collections
import pathlib

import keras
import numpy as np
import requests
import state_of_the_union
import tensorflow as tf
import tensorflow_datasets as tfds
import tensorflow_text as tf_text

PADDING_ID, UNKNOWN_ID, EOS_ID = range(3)
_SPECIAL = ("", "<unk>", "<eos>")  # no words of a text: the tokeniser sets "<" and ">" apart

# Regular expressions (RE2). \p{L} is a letter, \p{Lu} a capital one.
_ABBREVIATION = r"Mr|Mrs|Messrs|Ms|Dr|St|Hon|Gen|Lt|Col|Capt|Sgt|Rep|Sen|Gov|Nos?|\p{Lu}"
_END = r"""[.?!]["'”’)]*"""
_BEGIN = r"""["'“‘(]*\p{Lu}"""
_NUMBER = r"\d[\d,.]*\d|\d"
# Words without a space around them: "u.s", "'s", a run of dashes or dots, any other mark.
_APART = r"\b\p{L}(?:\.\p{L})+\b|'(?:s|t|d|m|ll|re|ve)\b|[-–—]+|\.+|[^\p{L}\s]"

_FILE_BLOCKS = 100
_FILE_HELD_OUT = {9: "validation", 19: "test"}  # of every 20 blocks
_BUCKET_WIDTH = 4


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
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(
            "The dataset must be one that tensorflow-datasets knows; "
            f"`tfds.list_builders()` names them. Received: {name!r}"
        ) from error
    if "text" not in builder.info.features:
        raise ValueError(
            f"The dataset must have a feature 'text'. Received: {name!r}, which has "
            f"{sorted(builder.info.features)}"
        )
    _prepare(builder)

    if not {"train", "test"} <= set(builder.info.splits):
        raise ValueError(
            "The dataset must have splits 'train' and 'test'. Received: "
            f"{name!r}, which has {sorted(builder.info.splits)}"
        )

    parts = {"train": "train", "validation": "validation", "test": "test"}
    if "validation" not in builder.info.splits:
        parts.update(train="train[1%:]", validation="train[:1%]")
    for part, split in parts.items():
        parts[part] = builder.as_dataset(split=split).map(lambda example: example["text"])
        if builder.name != "lm1b":  # its examples are sentences already
            parts[part] = _sentences(parts[part])
    return parts


def load_file(path):
    """Loads a UTF-8 text file with a sentence or a paragraph on each line.

    Of every 20 hundredths of the file, one is held out for validation and one for testing: whole
    blocks of lines, so that few held-out lines have a neighbour in training.

    Args:
        path: The file.

    Returns:
        What `load_dataset` returns.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not UTF-8, or has less than 100 lines of text.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"The text file must exist. Received: {str(path)!r}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            "The text file must be UTF-8; `iconv -f ISO-8859-1 -t UTF-8` converts a Latin-1 one. "
            f"Received: {str(path)!r}, byte {error.object[error.start]:#04x} at {error.start}"
        ) from error
    lines = [line for line in lines if line.strip()]
    if len(lines) < _FILE_BLOCKS:
        raise ValueError(
            f"The text file must have at least {_FILE_BLOCKS} lines of text, a sentence or a "
            f"paragraph on each, for parts of it to be held out. Received: {str(path)!r} with "
            f"{len(lines)}"
        )
    parts = {"train": [], "validation": [], "test": []}
    for i, block in enumerate(np.array_split(np.array(lines, object), _FILE_BLOCKS)):
        parts[_FILE_HELD_OUT.get(i % 20, "train")].extend(block)
    return {
        part: _sentences(tf.data.Dataset.from_tensor_slices(lines)) for part, lines in parts.items()
    }


def build_vocabulary(sentences, size):
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
        lookup: What `build_vocabulary` returns.

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


def batches(sentences, words_per_batch, max_length=64, seed=None, epochs=1):
    """Batches sentences of like length.

    Every word and every end of sentence is a target exactly once per epoch: a sentence too long
    is cut into even pieces, each of which starts from the last word of the one before. Nothing
    random comes from global state, so equal arguments give equal batches in equal order.

    Args:
        sentences: What `encode` returns.
        words_per_batch: The most positions B * L of a batch, padding included.
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

    schedule = _schedule(lengths, words_per_batch, max_length, seed, epochs)
    dataset = tf.data.Dataset.from_tensor_slices(schedule).map(
        lambda rows: tuple(tf.gather(words, rows).to_tensor() for words in (inputs, targets))
    )
    return dataset.prefetch(tf.data.AUTOTUNE)


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


def _schedule(lengths, words_per_batch, max_length, seed, epochs):
    """Returns the rows of each batch, a `tf.RaggedTensor` [steps, (B)].

    Bucketed by length as `tf.data.Dataset.bucket_by_sequence_length` does, but before training
    instead of row by row during it, and without small batches at the end.
    """
    longest = np.array([*range(_BUCKET_WIDTH, max_length, _BUCKET_WIDTH), max_length])
    bucket = np.searchsorted(longest, lengths)
    rows_per_batch = _even_pieces(
        np.bincount(bucket, minlength=len(longest)), words_per_batch // longest
    )
    random = np.random.default_rng(seed)
    schedule = []
    for _ in range(epochs):
        rows = np.arange(len(lengths)) if seed is None else random.permutation(len(lengths))
        rows = rows[np.argsort(bucket[rows], kind="stable")]
        epoch = np.split(rows, np.cumsum(rows_per_batch)[:-1])
        if seed is not None:
            random.shuffle(epoch)
        schedule.extend(epoch)
    return tf.RaggedTensor.from_row_lengths(
        np.concatenate(schedule), [len(rows) for rows in schedule]
    )


def _even_pieces(lengths, max_length):
    """Cuts things of the given lengths into even pieces and returns the pieces' lengths."""
    num_pieces = -(-lengths // max_length)
    first_piece = np.cumsum(num_pieces) - num_pieces
    lengths, num_pieces, first_piece = (
        np.repeat(x, num_pieces) for x in (lengths, num_pieces, first_piece)
    )
    piece = np.arange(len(lengths)) - first_piece  # its number within the sentence
    return lengths * (piece + 1) // num_pieces - lengths * piece // num_pieces
