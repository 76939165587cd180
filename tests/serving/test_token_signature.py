"""Ids of tokens behind a server with batching: each row has its own length and its own faults."""

import batching_server
import c_api
import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import assign_random_weights

import keras_moe
from keras_moe.serving import token_signature

VOCABULARY, PRIVATE = 50, 48_151_623  # an id that nobody else may hear of
TOKENS = tf.TensorSpec([None, None], "int32", "tokens")


def ten_lines(mask_zero=True):
    """The model of the README in small, built by its first batch as `fit` does."""
    model = keras.Sequential(
        [
            keras.layers.Embedding(VOCABULARY, 8, mask_zero=mask_zero),
            keras_moe.SparseMoE(num_experts=8, hidden_units=16, k=2),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(2, activation="softmax"),
        ]
    )
    model(np.ones((4, 7)))
    assign_random_weights(model, np.random.default_rng(0))
    return model


class Served:
    """The export of `ten_lines`, and what it has to answer."""

    def __init__(self, program, folder):
        self.model = ten_lines()
        path = keras_moe.export_saved_model(self.model, folder, lengths=True)
        self.server = c_api.Server(program, path)

    def ask(self, request):
        return self.server.ask("serving_default", **request)

    def expected(self, request):
        """Row by row, of the ids that count alone."""
        rows = zip(request["inputs"], request["lengths"], strict=True)
        return np.concatenate([self.model(row[None, :length]) for row, length in rows])


@pytest.fixture(scope="module")
def served(program, tmp_path_factory):
    served = Served(program, tmp_path_factory.mktemp("served"))
    yield served
    assert served.server.close() == 0


def request(rows, width, seed):
    rng = np.random.default_rng(seed)
    return {
        "inputs": rng.integers(1, VOCABULARY, (rows, width)).astype("int32"),
        "lengths": rng.integers(1, width + 1, rows).astype("int32"),
    }


def test_requests_of_different_lengths_share_a_batch(served):
    requests = [request(rows, width, width) for rows, width in ((1, 3), (2, 9), (1, 1), (5, 4))]
    answer = served.ask(batching_server.merged(requests))
    for alone, mine in zip(requests, batching_server.split(answer, requests), strict=True):
        assert mine["status"].tolist() == [b"ok"] * len(alone["inputs"])
        np.testing.assert_allclose(mine["outputs"], served.expected(alone), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(
            mine["outputs"], served.ask(alone)["outputs"], rtol=1e-5, atol=1e-5
        )


HOSTILE = {
    "unknown id": ([5, PRIVATE, 5], 3, b"`inputs` must be ids from 0 to 49"),
    "first unknown id": ([5, VOCABULARY, 5], 3, b"`inputs` must be ids from 0 to 49"),
    "largest id": ([2**31 - 1] * 3, 3, b"`inputs` must be ids from 0 to 49"),
    "negative id": ([5, 5, -1], 3, b"`inputs` must be ids from 0 to 49"),
    "padding": ([0, 0, 5], 2, b"`inputs` must not be padding alone"),
    "no length": ([5, 5, 5], 0, b"`lengths` must be at least 1"),
    "negative length": ([5, 5, 5], -PRIVATE, b"`lengths` must be at least 1"),
    "too long": ([5, 5, 5], PRIVATE, b"`lengths` must not be above the width of `inputs`"),
}


@pytest.fixture(scope="module")
def callers(served):
    """32 requests, and their answers."""
    requests = [request(1, 1 + i % 6, seed=i) for i in range(32)]
    return requests, [served.expected(asked) for asked in requests]


@pytest.mark.parametrize("name", HOSTILE)
def test_one_hostile_row_of_32_is_told_so_and_31_get_their_answers(name, served, callers):
    ids, length, fault = HOSTILE[name]
    hostile = {"inputs": np.array([ids], "int32"), "lengths": np.array([length], "int32")}
    requests, expected = list(callers[0]), callers[1]
    requests[17] = hostile
    answers = batching_server.split(served.ask(batching_server.merged(requests)), requests)
    for i, answer in enumerate(answers):
        if i == 17:
            assert answer["status"].tolist() == [fault]
            assert np.all(np.isnan(answer["outputs"]))
        else:
            assert answer["status"].tolist() == [b"ok"]
            np.testing.assert_allclose(answer["outputs"], expected[i], rtol=1e-5, atol=1e-5)
    assert served.ask(hostile)["status"].tolist() == [fault]


def test_what_is_behind_the_end_of_a_row_does_not_count(served):
    asked = request(8, 6, seed=0)
    behind = np.arange(6) >= asked["lengths"][:, None]
    strange = {**asked, "inputs": np.where(behind, PRIVATE, asked["inputs"])}
    answer = served.ask(strange)
    assert set(answer["status"]) == {b"ok"}
    np.testing.assert_array_equal(answer["outputs"], served.ask(asked)["outputs"])


@pytest.mark.parametrize("rows, width", [(0, 3), (2, 0), (0, 0)])
def test_of_nothing_there_is_no_answer(rows, width, served):
    answer = served.ask({"inputs": np.ones((rows, width), "int32"), "lengths": np.ones(rows, "i4")})
    assert answer["outputs"].shape == (rows, 2)
    assert np.all(np.isnan(answer["outputs"])) and b"ok" not in answer["status"]


@pytest.mark.parametrize(
    "changed",
    [
        {"lengths": np.ones(1, "int32")},
        {"lengths": np.ones((2, 1), "int32")},
        {"inputs": np.full(2, PRIVATE, "int32")},
        {"inputs": np.full((2, 3), PRIVATE, "float32")},
        {"inputs": np.full((2, 3, 1), PRIVATE, "int32")},
    ],
)
def test_no_error_tells_what_was_asked(changed, served):
    wrong = {"inputs": np.full((2, 3), PRIVATE, "int32"), "lengths": np.full(2, 3, "int32")}
    code, message = served.ask({**wrong, **changed})
    assert code != 0 and str(PRIVATE) not in message
    assert served.ask(request(1, 2, seed=0))["status"].tolist() == [b"ok"]


# What becomes of other models


def answers(signature, **inputs):
    function, specs = signature
    assert sorted(spec.name for spec in tf.nest.flatten(specs)) == sorted(inputs)
    flat = [tf.constant(inputs[spec.name], spec.dtype) for spec in tf.nest.flatten(specs)]
    outputs = tf.function(function, autograph=False)(*tf.nest.pack_sequence_as(specs, flat))
    return {name: output.numpy() for name, output in outputs.items()}


def test_outputs_of_every_kind_are_cut_off_and_say_nothing_of_bad_rows():
    def describe(tokens):
        return {
            "each": tf.cast(tokens, "float16") + 1,
            "number": tf.reduce_sum(tokens, axis=1),
            "byte": tf.cast(tf.reduce_sum(tokens, axis=1), "uint8"),
            "name": tf.strings.as_string(tf.reduce_sum(tokens, axis=1)),
            "odd": tokens % 2 == 1,
            "pair": tf.stack([tokens, tokens], axis=2)[:, :1],
        }

    signature = token_signature(describe, [TOKENS], vocabulary_size=10, max_length=4)
    ids = [[3, 9, 9, 9, 9, 9], [3, 4, 9, 9, 9, 9], [3, 99, 1, 1, 1, 1], [1] * 6]
    answer = answers(signature, tokens=ids, lengths=[1, 2, 3, 5])
    nan = float("nan")
    # As wide as the longest row without a fault, two ids. The third has an id of 99, the fourth
    # more than four.
    expected = {
        "each": [[4, 0], [4, 5], [nan, nan], [nan, nan]],
        "number": [3, 7, -1, -1],
        "byte": [3, 7, 255, 255],
        "name": [b"3", b"7", b"", b""],
        "odd": [[True, False], [True, False], [False, False], [False, False]],
        "pair": [[[3, 3]], [[3, 3]], [[-1, -1]], [[-1, -1]]],
    }
    status = answer.pop("status").tolist()
    assert status[:2] == [b"ok"] * 2 and b"99" not in status[2]
    assert status[3] == b"`tokens` must have at most 4 ids"
    assert answer.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(answer[name], value)


def two_inputs():
    words = keras.Input((None,), dtype="int64", name="words")
    tags = keras.Input((None,), dtype="uint8", name="tags")
    style = keras.Input((3,), name="style")
    pool = keras.layers.GlobalAveragePooling1D()
    x = pool(keras.layers.Embedding(9, 3, mask_zero=True)(words))
    y = keras.layers.Embedding(5, 3, mask_zero=True)(tags)
    return keras.Model({"words": words, "tags": tags, "style": style}, {"x": x + style, "y": y})


def test_each_input_of_ids_has_lengths_of_its_own():
    model = two_inputs()
    assign_random_weights(model, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"`vocabulary_size` must be given.*of \[5, 9\] ids"):
        token_signature(model)
    signature = token_signature(model, vocabulary_size={"words": 9, "tags": 5})
    inputs = {"words": [[8, 2, 7], [1, 7, 7]], "tags": [[4, 3], [2, 4]], "style": np.ones((2, 3))}
    answer = answers(signature, **inputs, words_lengths=[2, 1], tags_lengths=[1, 1])
    words, tags = np.array([[8, 2, 0], [1, 0, 0]]), np.array([[4], [2]])
    expected = model({"words": words, "tags": tags, "style": np.ones((2, 3))})
    assert answer.pop("status").tolist() == [b"ok", b"ok"]
    for name, value in expected.items():
        np.testing.assert_allclose(answer[name], value, rtol=1e-5, atol=1e-6)
    faults = answers(signature, **inputs, words_lengths=[2, 4], tags_lengths=[3, 1])["status"]
    assert [fault.split(b" ")[0] for fault in faults] == [b"`tags_lengths`", b"`words_lengths`"]


def test_what_has_one_width_needs_no_lengths():
    model = keras.Sequential(
        [
            keras.Input((4,), dtype="int32", name="tokens"),
            keras.layers.Embedding(9, 3),
            keras.layers.Flatten(),
            keras.layers.Dense(2),
        ]
    )
    tokens = np.array([[1, 2, 7, 0], [1, 2, 3, 9], [0, 0, 0, 0]], "int32")
    answer = answers(token_signature(model), tokens=tokens)
    assert [status == b"ok" for status in answer["status"]] == [True, False, True]
    np.testing.assert_allclose(answer["outputs"][::2], model(tokens[::2]), rtol=1e-5, atol=1e-6)
    assert np.all(np.isnan(answer["outputs"][1]))


def test_ids_of_other_shapes_are_checked_where_their_number_is_known():
    def describe(tokens, group, count):
        return {"sum": tf.reduce_sum(tokens, axis=1) + group + count[:, 0]}

    group = tf.TensorSpec([None], "int32", "group")
    count = tf.TensorSpec([None, 1], "int32", "count")
    sizes = {"tokens": 9, "group": 3, "count": None}
    signature = token_signature(describe, [TOKENS, group, count], vocabulary_size=sizes)
    given = {"tokens": [[1, 8]] * 3, "group": [2, 3, 0], "count": [[70], [70], [70]]}
    answer = answers(signature, **given, lengths=[1, 1, 2])
    assert answer["status"].tolist() == [b"ok", b"`group` must be ids from 0 to 2", b"ok"]
    assert answer["sum"].tolist() == [1 + 2 + 70, -1, 1 + 8 + 70]


def test_a_translation_model_takes_lengths_of_both_its_inputs():
    model = keras_moe.models.TranslationModel(20, 4, lstm_units=4, num_lstms=(2, 1))
    model.build((None, None))
    assign_random_weights(model, np.random.default_rng(0))
    specs = [tf.TensorSpec([None, None], "int32", name) for name in ("source", "target")]
    signature = token_signature(model, [specs], max_length={"source": 5})
    source, target = np.array([[3, 4, 7], [3, 7, 7]]), np.array([[2, 5], [2, 9]])
    answer = answers(
        signature, source=source, target=target, source_lengths=[3, 1], target_lengths=[2, 1]
    )
    expected = model((source[1:, :1], target[1:, :1]))[0]
    np.testing.assert_allclose(answer["outputs"][1, :1], expected, rtol=1e-5, atol=1e-5)
    assert not np.any(answer["outputs"][1, 1:])


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (lambda: ten_lines(mask_zero=False), {}, "must not depend on it.*'outputs' does depend"),
        (
            lambda: len,
            {"input_signature": [tf.TensorSpec([None, 3], name="x")]},
            "An input must be",
        ),
        (lambda: len, {"input_signature": [TOKENS]}, "`vocabulary_size` must be given where"),
        (ten_lines, {"max_length": 0}, "`max_length` must be an integer of at least 1"),
        (ten_lines, {"max_length": {"words": 3}}, "`max_length` must have names of.*: inputs. R"),
        (lambda: lambda tokens: {"status": tokens}, {}, "No output may be called 'status'"),
        (lambda: lambda tokens: tf.reduce_sum(tokens), {}, "an entry for each row.*shape ()"),
        (lambda: lambda tokens: tokens[0], {}, "an entry for each row of ids"),
        (lambda: lambda tokens: tokens[:, 1:], {}, "'outputs' does depend on how far 'tokens'"),
        (lambda: lambda tokens: tokens - tf.shape(tokens)[1], {}, "'outputs' does depend on how"),
    ],
)
def test_what_is_refused(model, arguments, message):
    model = model()
    if not arguments and not isinstance(model, keras.Model):
        arguments = {"input_signature": [TOKENS], "vocabulary_size": 9}
    with pytest.raises(ValueError, match=message):
        token_signature(model, **arguments)


def test_weights_in_bfloat16_are_read_through_a_tf_function(tmp_path):
    model = keras.Sequential(
        [
            keras.layers.Embedding(VOCABULARY, 8, mask_zero=True),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(2, activation="softmax"),
        ]
    )
    in_graph = tf.function(lambda tokens: {"probabilities": model(tokens)})
    expected = in_graph(tf.constant([[1, 2]]))["probabilities"]
    signature = token_signature(in_graph, [TOKENS], vocabulary_size=VOCABULARY)
    path = keras_moe.export_saved_model(
        model, tmp_path, signatures={"serving_default": signature}, dtype="bfloat16"
    )
    served = tf.saved_model.load(path)
    assert "bfloat16" in {v.dtype.name for v in served.stored}
    answer = served.signatures["serving_default"](
        tokens=tf.constant([[1, 2, 7]]), lengths=tf.constant([2])
    )
    np.testing.assert_allclose(answer["probabilities"], expected, atol=0.02)


def test_lengths_are_for_the_own_call_of_a_model(tmp_path):
    signatures = {"serving_default": (len, [TOKENS])}
    with pytest.raises(ValueError, match="`lengths` is for the model's own call"):
        keras_moe.export_saved_model(ten_lines(), tmp_path, signatures=signatures, lengths=True)
