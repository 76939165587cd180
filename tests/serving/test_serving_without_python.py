"""Exports answer through TensorFlow's C API and saved_model_cli, also after hostile requests."""

import subprocess
import sys

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
            return {"tokens": rng.integers(0, 13, size=(batch, 1 + batch % 5)).astype("int32")}
        sentences = [" ".join(rng.choice(WORDS, size=i % 6)) for i in range(batch)]
        return {"sentences": np.array(sentences, "S")}

    def expected(self, signature, request):
        if signature == "serving_default":
            return {"probabilities": np.exp(self.model.predict(request["tokens"], verbose=0))}
        function, _ = self.signatures[signature]
        return {name: value.numpy() for name, value in function(**request).items()}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return Exported(tmp_path_factory.mktemp("exported"))


@pytest.fixture
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
            ((name, value),) = request.items()
            np.save(folder / "request.npy", value)
            options = ("--signature_def", signature, "--inputs", f"{name}={folder}/request.npy")
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


@pytest.mark.parametrize(
    "request_",
    [
        {"tokens": ids(2, 3, dtype="float32")},
        {"tokens": ids(2, 3, dtype="int64")},
        {"tokens": text(b"the war")},
        {"tokens": ids(3)},
        {"tokens": ids()},
        {"tokens": ids(2, 3, 1)},
        {"tokens": ids(2, 3, value=13)},
        {"tokens": ids(2, 3, value=2**31 - 1)},
        {"tokens": ids(2, 3, value=-1)},
        {"tokens": ids(1, 10**6)},
        {"tokens": ids(4, 0)},
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


def test_empty_batches_get_empty_answers(server):
    answer = server.ask("serving_default", tokens=ids(0, 4))
    assert answer["probabilities"].shape == (0, 4, 13)
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
            if signature == "score":  # Padded up to the longest sentence's length.
                np.testing.assert_array_equal(mine[:, 4:], 0.0)
                mine = mine[:, :4]
            if value.dtype == object:
                np.testing.assert_array_equal(mine, value)
            else:
                np.testing.assert_allclose(mine, value, rtol=1e-6, atol=1e-6)
    request = exported.request("next_words", 3)
    assert_same(server.ask("next_words", **request), exported.expected("next_words", request))
