"""Sentences and their translations: Django's messages, files, datasets of tensorflow-datasets."""

import gettext
import lzma
import pathlib

import django
import django_catalogs
import parallel_text
import pytest
import requests
import tensorflow_datasets as tfds
from helpers import network_cut


def strings(dataset):
    return [tuple(side.decode() for side in pair) for pair in dataset.as_numpy_iterator()]


def write_lines(path, lines):
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


# Django's message catalogs


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """English and French, prepared with the network cut."""
    directory = tmp_path_factory.mktemp("tensorflow_datasets")
    with network_cut():
        parallel_text.load_dataset(data_dir=directory)
    return directory


def test_messages_are_those_that_gettext_finds():
    folder = pathlib.Path(django.__file__).parent / "conf" / "locale"
    translation = gettext.translation("django", folder, ["fr"])
    pairs = django_catalogs.messages("fr")
    for message in ("Enter a valid value.", "Enter a whole number.", "This field is required."):
        assert (message, translation.gettext(message)) in pairs
    one, many = "%(num)d year", "%(num)d years"
    for message, number in ((one, 1), (many, 5)):
        assert (message, " ".join(translation.ngettext(one, many, number).split())) in pairs
    assert all(source and target for source, target in pairs)
    assert len(set(pairs)) == len(pairs)


def test_a_catalog_that_is_none_is_refused():
    with pytest.raises(ValueError, match="must begin with 0x950412de. Received: 0x20202020"):
        list(django_catalogs.read_catalog(b" " * 28))


def test_messages_are_held_out_alike_in_all_languages(data_dir):
    corpora = parallel_text.load_dataset(pairs=["en-fr"], data_dir=data_dir)
    parts = {part: strings(pairs) for part, pairs in corpora["en-fr"].items()}
    assert sorted(sum(parts.values(), [])) == sorted(django_catalogs.messages("fr"))
    for part, pairs in parts.items():
        assert {django_catalogs.split_of(source) for source, _ in pairs} == {part}
    # A tenth of the messages for each purpose, but there are only several hundred.
    total = sum(map(len, parts.values()))
    assert all(0.07 < len(parts[part]) / total < 0.13 for part in ("validation", "test"))


def test_a_source_can_be_any_side(data_dir):
    there, back = (
        parallel_text.load_dataset(pairs=[pair], data_dir=data_dir)[pair]["test"]
        for pair in ("en-fr", "fr-en")
    )
    assert strings(there) == [pair[::-1] for pair in strings(back)]


# Datasets of tensorflow-datasets


class Phrases(tfds.core.GeneratorBasedBuilder):
    """A dataset of one pair, without configurations and without validation."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.Translation(languages=("de", "en"))
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(200), "test": self._generate_examples(10)}

    def _generate_examples(self, number):
        for i in range(number):
            yield i, {"de": f"Satz {i}", "en": f"sentence {i}"}


def test_validation_is_carved_out_of_train(tmp_path):
    parts = parallel_text.load_dataset("phrases", ["en-de"], tmp_path)["en-de"]
    pairs = {part: strings(examples) for part, examples in parts.items()}
    # 1 % of 200 examples are 2.
    assert {part: len(some) for part, some in pairs.items()} == {
        "train": 198,
        "validation": 2,
        "test": 10,
    }
    numbers = range(200)
    assert set(pairs["train"] + pairs["validation"]) == {
        (f"sentence {i}", f"Satz {i}") for i in numbers
    }


@pytest.mark.parametrize(
    "name, pair, message",
    [
        ("no_such_set", "en-fr", "tensorflow-datasets knows.*Received: 'no_such_set'"),
        ("phrases", "en-fr", r"two languages of the dataset.*'en-fr' of 'phrases'.* de, en"),
        ("phrases", "en", r"two languages of the dataset.*'en' of 'phrases'"),
        ("phrases", "en-en", r"two languages of the dataset.*'en-en' of 'phrases'"),
        ("django_catalogs", "en-xx", r"one of the dataset. Received: 'en-xx'.*en-fr, "),
        ("wmt14_translate", "en-xx", r"one of the dataset. Received: 'en-xx'.*fr-en"),
    ],
)
def test_unusable_dataset_is_refused(tmp_path, name, pair, message):
    with pytest.raises(ValueError, match=message):
        parallel_text.load_dataset(name, [pair], tmp_path)


def test_unreachable_dataset_is_refused_at_once(tmp_path, monkeypatch):
    asked = []

    def unreachable(*args, **kwargs):
        asked.append(args)
        raise requests.ConnectionError("Name or service not known")

    monkeypatch.setattr(requests, "get", unreachable)
    with pytest.raises(ConnectionError, match="'wmt14_translate' cannot be downloaded.*not known"):
        parallel_text.load_dataset("wmt14_translate", ["en-fr"], tmp_path)
    assert len(asked) == 1  # tensorflow-datasets alone tries for minutes


# Files


def test_files_beside_the_training_part_are_held_out(tmp_path):
    for part, word in (("train", "a"), ("valid", "b"), ("test", "c")):
        with lzma.open(tmp_path / f"en-fr.{part}.tsv.xz", "wt", encoding="utf-8") as file:
            file.write(f"{word} 1\t{word} un\n\n {word} 2 \t{word} deux\r\n")
    corpora = parallel_text.load_files([tmp_path / "en-fr.train.tsv.xz"])
    assert {part: strings(pairs) for part, pairs in corpora["en-fr"].items()} == {
        part: [(f"{word} 1", f"{word} un"), (f"{word} 2", f"{word} deux")]
        for part, word in (("train", "a"), ("validation", "b"), ("test", "c"))
    }
    assert list(parallel_text.sentences(corpora)) == ["a 1", "a 2", "a un", "a deux"]


def test_file_is_held_out_by_blocks_of_lines(tmp_path):
    # A line for each of 100 blocks; of every 20 blocks number 9 is for validation, 19 for test.
    path = write_lines(tmp_path / "mine.tsv", [f"{i}\tn{i}" for i in range(100)])
    parts = parallel_text.load_files([path])["mine"]
    assert strings(parts["validation"]) == [(f"{i}", f"n{i}") for i in range(9, 100, 20)]
    assert strings(parts["test"]) == [(f"{i}", f"n{i}") for i in range(19, 100, 20)]
    assert len(parts["train"]) == 90


@pytest.mark.parametrize("line", ["one column", "a\tb\tc", "a\t ", "\tb"])
def test_a_line_that_is_no_pair_is_refused(tmp_path, line):
    path = write_lines(tmp_path / "mine.tsv", ["a\tb"] * 99 + [line])
    with pytest.raises(
        ValueError, match="a source, one tab, and its translation. Received: .*mine"
    ):
        parallel_text.load_files([path])


def test_missing_and_short_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="must exist. Received: .*en-fr.valid.tsv"):
        parallel_text.load_files([write_lines(tmp_path / "en-fr.train.tsv", ["a\tb"])])
    with pytest.raises(ValueError, match="at least 100 lines.*with 1"):
        parallel_text.load_files([write_lines(tmp_path / "mine.tsv", ["a\tb"])])


# Several pairs


def test_sources_name_the_language_to_write(tmp_path):
    paths = [
        write_lines(tmp_path / f"en-{language}.tsv", [f"{i}\t{language} {i}" for i in range(100)])
        for language in ("fr", "pt_BR")
    ]
    corpora = parallel_text.name_targets(parallel_text.load_files(paths))
    assert strings(corpora["en-fr"]["test"])[0] == ("<2fr> 19", "fr 19")
    assert strings(corpora["en-pt_BR"]["test"])[0] == ("<2pt_BR> 19", "pt_BR 19")


@pytest.mark.parametrize("pair", ["mine", "en-", "-fr"])
def test_a_pair_that_names_no_language_is_refused(pair):
    with pytest.raises(ValueError, match=f"source and target language.*Received: '{pair}'"):
        parallel_text.target_token(pair)


def test_two_files_of_one_pair_are_refused(tmp_path):
    path = write_lines(tmp_path / "en-fr.tsv", ["a\tb"] * 100)
    with pytest.raises(ValueError, match="another pair.*Received: .*en-fr.tsv, .*en-fr.tsv"):
        parallel_text.load_files([path, path])
