"""Exports answer through TensorFlow's C API and saved_model_cli, also after hostile requests."""

import subprocess
import sys

import batching_server
import c_api
import keras
import numpy as np
import pytest
import serving
from helpers import assign_random_weights

import keras_moe

WORDS = "the we have of to and in our this war".split()
INVALID_ARGUMENT = 3


class Exported:
    """A language model with weights that differ, its export, and what it has to answer."""

    def __init__(self, folder):
        keras.utils.set_random_seed(0)
        middle = keras_moe.SparseMoE(8, 16, k=2)
        self.lookup = keras.layers.StringLookup(
            vocabulary=["<eos>", *WORDS], mask_token="", oov_token="<unk>"
        )
        self.model = keras_moe.models.LanguageModel(len(self.lookup.get_vocabulary()), 8, middle)
        self.model.build((None, None))
        assign_random_weights(self.model, np.random.default_rng(0))
        self.signatures = serving.signatures(self.model, self.lookup)
        self.path = keras_moe.export_saved_model(
            self.model, folder, signatures=self.signatures, track=[self.lookup]
        )

    def request(self, signature, batch):
        rng = np.random.default_rng(batch)
        if signature == "serving_default":
            width = 1 + batch % 5
            tokens = rng.integers(1, 13, size=(batch, width)).astype("int32")
            lengths = rng.integers(1, width + 1, size=batch).astype("int32")
            lengths[0] = width
            return {"tokens": tokens, "lengths": lengths}
        sentences = [" ".join(rng.choice(WORDS, size=i % 6)) for i in range(batch)]
        return {"sentences": np.array(sentences, "S")}

    def expected(self, signature, request):
        if signature == "serving_default":
            tokens, lengths = request.values()
            inside = np.arange(tokens.shape[1]) < lengths[:, None]
            answer = np.exp(self.model.predict(tokens * inside, verbose=0)) * inside[..., None]
            return {"probabilities": answer, "status": np.full(len(tokens), b"ok", object)}
        function, _ = self.signatures[signature]
        return {name: value.numpy() for name, value in function(**request).items()}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return Exported(tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="module")
def server(exported, program):
    server = c_api.Server(program, exported.path)
    yield server
    assert server.close() == 0


def assert_same(answer, expected):
    assert answer.keys() == expected.keys()
    for name, value in expected.items():
        assert answer[name].shape == value.shape
        if value.dtype == object:
            np.testing.assert_array_equal(answer[name], value)
        else:
            np.testing.assert_allclose(answer[name], value, rtol=1e-5, atol=1e-5)


SIGNATURES = ("serving_default", "score", "next_words")


def test_the_c_api_answers_as_the_model(server, exported):
    for signature in SIGNATURES:
        for batch in (1, 7, 64):
            request = exported.request(signature, batch)
            assert_same(server.ask(signature, **request), exported.expected(signature, request))


# Several command lines in one process, since each would start TensorFlow anew.
COMMANDS = """
import sys
from tensorflow.python.tools import saved_model_cli
for line in sys.stdin.read().splitlines():
    sys.argv = ["saved_model_cli", *line.split("\\t")]
    try:
        saved_model_cli.main()
    except SystemExit as end:
        assert not end.code, line
"""


def test_saved_model_cli_answers_as_the_model(exported, tmp_path):
    lines, requests = [], {}
    for signature in SIGNATURES:
        for batch in (1, 7, 64):
            folder = tmp_path / f"{signature}_{batch}"
            folder.mkdir()
            requests[signature, folder] = request = exported.request(signature, batch)
            for name, value in request.items():
                np.save(folder / f"request_{name}.npy", value)
            inputs = ";".join(f"{name}={folder}/request_{name}.npy" for name in request)
            options = ("--signature_def", signature, "--inputs", inputs)
            where = ("--dir", exported.path, "--tag_set", "serve", "--outdir", folder)
            lines.append("\t".join(map(str, ("run", *where, *options))))
    finished = subprocess.run(
        [sys.executable, "-c", COMMANDS], input="\n".join(lines), capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    for (signature, folder), request in requests.items():
        expected = exported.expected(signature, request)
        answer = {name: np.load(folder / f"{name}.npy", allow_pickle=True) for name in expected}
        assert_same(answer, expected)


def ids(*shape, value=1, dtype="int32"):
    return np.full(shape, value, dtype)


def text(*sentences):
    return np.array(sentences, object)


def some_tokens(tokens, lengths=None):
    return {"tokens": tokens, "lengths": ids(2, value=3) if lengths is None else lengths}


@pytest.mark.parametrize(
    "request_",
    [
        some_tokens(ids(2, 3, dtype="float32")),
        some_tokens(ids(2, 3, dtype="int64")),
        some_tokens(text(b"the war", b"we")),
        some_tokens(ids(2)),
        some_tokens(ids()),
        some_tokens(ids(2, 3, 1)),
        some_tokens(ids(2, 3), ids(1)),
        some_tokens(ids(2, 3), ids()),
        some_tokens(ids(2, 3), ids(2, 1)),
        some_tokens(ids(2, 3), ids(2, dtype="int64")),
        {"tokens": ids(2, 3)},
        {"lengths": ids(2)},
        {"sentences": ids(2, 3)},
        {"sentences": text([b"the war"])},
        {},
    ],
)
def test_a_wrong_request_gets_an_error_and_the_next_one_an_answer(request_, server, exported):
    signature = "score" if "sentences" in request_ else "serving_default"
    code, message = server.ask(signature, **request_)
    assert code == INVALID_ARGUMENT, message
    good = exported.request(signature, 3)
    assert_same(server.ask(signature, **good), exported.expected(signature, good))


# Several requests in one batch


def test_requests_of_different_lengths_share_a_batch(server, exported):
    requests = [exported.request("serving_default", batch) for batch in (1, 3, 2, 9)]
    answer = server.ask("serving_default", **batching_server.merged(requests))
    for request, mine in zip(requests, batching_server.split(answer, requests), strict=True):
        longest = max(request["lengths"])
        assert not np.any(mine["probabilities"][:, longest:])
        mine["probabilities"] = mine["probabilities"][:, :longest]
        assert_same(mine, exported.expected("serving_default", request))
        assert_same(mine, server.ask("serving_default", **request))


@pytest.mark.parametrize(
    ("hostile", "length", "fault"),
    [
        (ids(1, 3, value=13), 3, b"`tokens` must be ids from 0 to 12"),
        (ids(1, 3, value=-1), 1, b"`tokens` must be ids from 0 to 12"),
        (ids(1, 1000), 1000, b"`tokens` must have at most 256 ids"),
        (ids(1, 3), 0, b"`lengths` must be at least 1"),
        (ids(1, 3, value=0), 3, b"`tokens` must not be padding alone"),
    ],
)
def test_31_rows_of_a_batch_do_not_suffer_from_one(hostile, length, fault, server, exported):
    good = exported.request("serving_default", 31)
    bad = {"tokens": hostile, "lengths": ids(1, value=length)}
    answer = server.ask("serving_default", **batching_server.merged([good, bad]))
    mine, theirs = batching_server.split(answer, [good, bad])
    assert_same(mine, exported.expected("serving_default", good))
    assert theirs["status"].tolist() == [fault]
    assert np.all(np.isnan(theirs["probabilities"]))


def test_scores_are_as_wide_as_the_longest_sentence_of_all(server):
    short, long = text(b"the war"), text(b"we have of to and in")
    alone = server.ask("score", sentences=short)
    both = server.ask("score", sentences=np.concatenate([short, long]))
    # Two words and the end; six words and the end.
    assert alone["log_probabilities"].shape == (1, 3) and alone["lengths"].tolist() == [3]
    assert both["log_probabilities"].shape == (2, 7) and both["lengths"].tolist() == [3, 7]
    mine = both["log_probabilities"][0]
    np.testing.assert_allclose(mine[:3], alone["log_probabilities"][0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(mine[3:], 0.0)


def test_empty_batches_get_empty_answers(server):
    answer = server.ask("serving_default", tokens=ids(0, 4), lengths=ids(0))
    assert answer["probabilities"].shape == (0, 1, 13)
    assert server.ask("score", sentences=text())["log_probabilities"].shape == (0, 1)
    assert server.ask("next_words", sentences=text())["words"].shape == (0, 5)


@pytest.mark.parametrize(
    "sentence",
    [
        b"the war " * 2**17,
        b"x" * 2**20,
        b" " * 2**20,
        b"\x00" * 2**20,
        b"\xff\xfe \xc3\x28 war \xf0\x28\x8c\xbc",
        bytes(range(256)),
    ],
    ids=["words", "word", "spaces", "nul", "no utf-8", "every byte"],
)
def test_hostile_text_leaves_its_neighbour_alone(sentence, server, exported):
    good = b"we have the"
    for signature in ("score", "next_words"):
        alone = server.ask(signature, sentences=text(good))
        both = server.ask(signature, sentences=text(sentence, good))
        for name, value in alone.items():
            mine = both[name][1:]
            if name == "log_probabilities":  # Padded up to the longest sentence's length.
                np.testing.assert_array_equal(mine[:, 4:], 0.0)
                mine = mine[:, :4]
            if value.dtype == object:
                np.testing.assert_array_equal(mine, value)
            else:
                np.testing.assert_allclose(mine, value, rtol=1e-6, atol=1e-6)
    request = exported.request("next_words", 3)
    assert_same(server.ask("next_words", **request), exported.expected("next_words", request))
