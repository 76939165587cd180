"""Sentences and their translations, in three parts: training, validation, test.

    corpora = parallel_text.load_dataset("wmt14_translate", ["en-fr", "en-de"])
    corpora = parallel_text.load_files(["en-fr.train.tsv.xz", "en-de.train.tsv.xz"])
    for source, target in corpora["en-fr"]["train"]:
        ...                                                 # string scalars

Of several pairs one model learns all, if the source begins with the language to write:

    corpora = parallel_text.name_targets(corpora)           # "<2fr> Good morning."
"""

import pathlib

import django_catalogs
import tensorflow as tf
import tensorflow_datasets as tfds
import tensorflow_datasets.translate  # noqa: F401  # Else there is no wmt14_translate.
import text
import text_files


def load_dataset(name=django_catalogs.DjangoCatalogs.name, pairs=("en-fr",), data_dir=None):
    """Loads pairs of languages from a dataset of tensorflow-datasets.

    Args:
        name: The dataset's name there, such as `"wmt14_translate"`; it needs a feature for each
            language, such as `en`, and splits `train` and `test`. Without a `validation` split, 1 %
            of `train` becomes that. The default, Django's message catalogs, needs no network.
        pairs: Source and target language of each pair, such as `"en-fr"`. A configuration of the
            dataset has that name or the reverse, if it has configurations; one that is called
            otherwise is a part of `name`, as in `"ted_hrlr_translate/ru_to_en"`.
        data_dir: Directory of the prepared data. Default: that of tensorflow-datasets.

    Returns:
        A dict from the pairs to dicts from `"train"`, `"validation"` and `"test"` to a
        `tf.data.Dataset` of sources and targets (string scalars).

    Raises:
        ConnectionError: The data is not prepared yet and cannot be downloaded.
        ValueError: There is no such dataset, or it doesn't have the languages.
    """
    return {pair: _load_pair(name, pair, data_dir) for pair in pairs}


def load_files(paths):
    """Loads files with a source, a tab and its translation on each line.

    Of a file `en-fr.train.tsv` the files `en-fr.valid.tsv` (or `.validation.`) and `en-fr.test.tsv`
    beside it are what is held out. Of every 20 hundredths of any other file, one is held out for
    validation and one for testing: whole blocks of lines. Files whose names end in `.gz`, `.bz2`
    or `.xz` are decompressed.

    Args:
        paths: The files. Their names up to the first full stop are those of the pairs.

    Returns:
        What `load_dataset` returns.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged or not UTF-8, too short for parts of it to be held out, or
            has a line that is no pair; or two files have the same name.
    """
    corpora = {}
    for path in map(pathlib.Path, paths):
        pair = path.name.partition(".")[0]
        if pair in corpora:
            raise ValueError(
                "Each file must be another pair, named up to the first full stop as "
                f"en-fr.train.tsv is. Received: {', '.join(map(str, paths))}"
            )
        corpora[pair] = {
            part: tf.data.Dataset.from_tensor_slices(_columns(lines, path))
            for part, lines in text_files.read_parts(path).items()
        }
    return corpora


def target_token(pair):
    """Returns the word that asks for a translation into the second language of a pair."""
    source, _, target = pair.partition("-")
    if not (source and target):
        raise ValueError(
            "Among several pairs each must be named by its source and target language, such as "
            f"en-fr. Received: {pair!r}"
        )
    return f"<2{target}>"


def name_targets(corpora):
    """Puts the word of its target's language before each source.

    Args:
        corpora: What `load_dataset` or `load_files` returns.

    Returns:
        The same with other sources.

    Raises:
        ValueError: A pair's name doesn't tell the language.
    """

    def name_target(examples, token):
        return examples.map(lambda source, target: (tf.strings.join([token, " ", source]), target))

    return {
        pair: {part: name_target(examples, target_token(pair)) for part, examples in parts.items()}
        for pair, parts in corpora.items()
    }


def sentences(corpora, part="train"):
    """Yields the sources and the targets of a part of all pairs as strings."""
    for parts in corpora.values():
        for sides in parts[part].batch(1000).as_numpy_iterator():
            for side in sides:
                yield from map(bytes.decode, side)


def _load_pair(name, pair, data_dir):
    """Returns a dict from parts to datasets."""
    languages = source, target = pair.partition("-")[::2]
    builder = text.open_builder(_with_configuration(name, languages), data_dir)
    features = builder.info.features
    if not (source != target and {source, target} <= set(features)):
        raise ValueError(
            "The pair must be of two languages of the dataset, such as en-fr. Received: "
            f"{pair!r} of {name!r}, which has {', '.join(sorted(features))}"
        )
    return {
        part: examples.map(lambda example: (example[source], example[target]))
        for part, examples in text.load_parts(builder).items()
    }


def _with_configuration(name, languages):
    """Returns the name with the configuration of a pair of languages, if there are any."""
    try:
        configurations = tfds.builder_cls(name.partition("/")[0]).builder_configs
    except tfds.core.DatasetNotFoundError:
        return name  # `text.open_builder` will tell.
    if "/" in name or not configurations:
        return name
    for configuration in ("-".join(languages), "-".join(reversed(languages))):
        if configuration in configurations:
            return f"{name}/{configuration}"
    raise ValueError(
        f"The pair must be one of the dataset. Received: {'-'.join(languages)!r} of {name!r}, "
        f"which has {', '.join(configurations)}"
    )


def _columns(lines, path):
    """Returns the list of sources and that of targets."""
    rows = [tuple(map(str.strip, line.split("\t"))) for line in lines]
    for row in rows:
        if len(row) != 2 or not all(row):
            raise ValueError(
                "Each line must hold a source, one tab, and its translation. Received: "
                f"{str(path)!r} with {'<tab>'.join(row)!r}"
            )
    sources, targets = zip(*rows, strict=True)
    return list(sources), list(targets)
