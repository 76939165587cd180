"""`export_saved_model`: what is in an export."""

import os

import keras
import numpy as np
import pytest
import tensorflow as tf
from combinations import covering, usually
from exports import TOKENS, assert_keeps_no_state, export, train
from helpers import EVERY_LAYER, WIDTH, assign_random_weights, examples, language_model, next_words
from keras.ops import convert_to_numpy as numpy

import keras_moe
from keras_moe.serving.signatures import trace
from keras_moe.serving.weights import StoredWeights


@pytest.mark.usefixtures("for_cpus")
@pytest.mark.parametrize("given", [{}, {"training": False}], ids=["bare", "training=False"])
def test_an_export_holds_what_answers_and_nothing_else(given, trained, tmp_path):
    model, x = trained
    signatures = {"serving_default": (lambda tokens: model(tokens, **given), [TOKENS])}
    expected = model.predict(x, verbose=0)
    before = [numpy(v) for v in (*model.variables, *model.metrics_variables)]
    answer, served = export(model, tmp_path, signatures=signatures)
    np.testing.assert_allclose(answer(x), expected, rtol=1e-5, atol=1e-5)
    assert_keeps_no_state(served)
    # Embedding, gate_kernel, two kernels of experts, dense kernel and bias: no noise_kernel, seed,
    # metric or slot of Adam.
    shapes = [v.shape.as_list() for v in served.stored]
    assert sorted(shapes) == [[8, 8], [8, 8, 16], [8, 16, 8], [8, 50], [50], [50, 8]]
    assert {v.dtype.name for v in served.stored} == {"float32"}
    stored = tf.train.list_variables(str(tmp_path / "1" / "variables" / "variables"))
    assert len([name for name, _ in stored if "VARIABLE_VALUE" in name]) == 6
    # And the export has left the model alone.
    for v, value in zip((*model.variables, *model.metrics_variables), before, strict=True):
        np.testing.assert_array_equal(v, value)
    assert model.losses == []


@covering(
    usual=[
        ("noisy_top_k", None),
        ("strictly_balanced", "bfloat16"),
        ("capacity", "bfloat16"),
        ("hierarchical", None),
        ("hierarchical_capacity", "bfloat16"),
    ],
    make=EVERY_LAYER,
    dtype=[None, "bfloat16"],
)
def test_all_layers_answer_as_they_do_in_the_model(make, dtype, tmp_path):
    model = keras.Sequential([keras.Input((None, WIDTH), name="x"), make()])
    assign_random_weights(model, np.random.default_rng(0))
    answer, served = export(model, tmp_path, name="x", dtype=dtype)
    for batch, time in ((1, 1), (5, 4), (3, 0), (0, 2)):
        x = examples(batch * time).reshape(batch, time, WIDTH)
        # Rounding to bfloat16, 8 bits, is off by 1/256 at most, in two kernels one after the other.
        tolerance = 1e-5 if dtype is None else 0.05
        np.testing.assert_allclose(answer(x), model(x), rtol=tolerance, atol=tolerance)
    assert_keeps_no_state(served)


def small():
    """A model that is soon exported, and its signature."""
    model = keras.Sequential([keras.Input((WIDTH,)), keras.layers.Dense(2)])
    return model, {"serving_default": (model, [tf.TensorSpec([None, WIDTH], name="x")])}


def test_versions_count_up(tmp_path):
    model, signatures = small()
    (tmp_path / "model" / "notes").mkdir(parents=True)
    (tmp_path / "model" / "notes" / "3").touch()
    for version, expected in ((None, "1"), (7, "7"), (None, "8"), (2, "2"), (None, "9")):
        path = keras_moe.export_saved_model(model, tmp_path / "model", version, signatures)
        assert path == tmp_path / "model" / expected
    assert sorted(os.listdir(tmp_path / "model")) == ["1", "2", "7", "8", "9", "notes"]
    assert os.stat(path).st_mode & 0o777 == os.stat(tmp_path / "model").st_mode & 0o777
    for folder, version, message in (
        ("model", 7, "never replaced.*Received: version=7"),
        ("model", 0, "`version` must be an integer of at least 1. Received: 0"),
        ("model/7", None, "a folder for each version.*Received: .*7', which is itself"),
    ):
        with pytest.raises(ValueError, match=message):
            keras_moe.export_saved_model(model, tmp_path / folder, version, signatures)


def test_an_export_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    model, signatures = small()
    save = tf.saved_model.save

    def save_and_fail(*args, **kwargs):
        save(*args, **kwargs)
        raise OSError("no space left")

    monkeypatch.setattr(tf.saved_model, "save", save_and_fail)
    with pytest.raises(OSError, match="no space left"):
        keras_moe.export_saved_model(model, tmp_path, signatures=signatures)
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("for_cpus")
def test_bfloat16_halves_the_room_and_keeps_the_routing(tmp_path):
    model, x = language_model(), tf.constant(next_words()[0], "int32")
    model.build((None, None))
    assign_random_weights(model, np.random.default_rng(0), scale=0.5)
    answer, served = export(
        model, tmp_path, signatures={"serving_default": (model, [TOKENS])}, dtype="bfloat16"
    )
    gating = model.get_layer("moe").gating
    for weight in model.weights:
        if len(weight.shape) >= 2 and all(weight is not w for w in gating.weights):
            weight.assign(tf.cast(tf.cast(weight, "bfloat16"), "float32"))
    np.testing.assert_allclose(answer(x), model(x), rtol=1e-5, atol=1e-5)
    kept = {tuple(v.shape): v.dtype.name for v in served.stored}
    assert kept.pop((8, 8)) == kept.pop((50,)) == "float32"  # gate_kernel, bias
    assert set(kept.values()) == {"bfloat16"}

    # 50·8 + 2·8·8·16 + 8·50 = 2848 weights at 2 bytes; 8·8 of the gating and 50 biases at 4.
    number_of_bytes = sum(v.shape.num_elements() * v.dtype.size for v in served.stored)
    assert number_of_bytes == 2 * 2848 + 4 * (64 + 50)


@pytest.mark.parametrize("dtype", usually(["bfloat16"], [None]))
def test_quantized_experts_are_exported_in_int8(dtype, tmp_path):
    expert = keras.Sequential([keras.layers.Dense(8, "tanh"), keras.layers.Dense(WIDTH)])
    moe = keras_moe.SparseMoE(3, experts=expert, k=2)
    model = keras.Sequential([keras.Input((WIDTH,), name="x"), moe])
    with pytest.warns((UserWarning, DeprecationWarning)):  # of layers that stay as they are
        model.quantize("int8")
    answer, served = export(model, tmp_path, name="x", dtype=dtype)
    x = examples(7)
    np.testing.assert_allclose(answer(x), model(x), rtol=1e-5, atol=1e-6)
    # Experts without rows count, too: 2·3 kernels in int8, 2·3 scales, 2·3 biases, gate_kernel.
    dtypes = [v.dtype.name for v in served.stored]
    assert (dtypes.count("int8"), dtypes.count("float32")) == (6, 13)


@pytest.mark.parametrize(
    "options", usually([{"use_bias": True, "num_shared_experts": 1}], [{}]), ids=str
)
def test_bfloat16_is_converted_where_it_is_read(options, tmp_path):
    model = language_model(**options)
    model.build((None, None))
    assign_random_weights(model, np.random.default_rng(0))
    pair, x = (model, [TOKENS]), tf.constant(next_words()[0], "int32")
    answer, _ = export(model, tmp_path, signatures={"serving_default": pair}, dtype="bfloat16")
    np.testing.assert_allclose(answer(x), model(x), atol=0.02 * np.abs(model(x)).max())
    graph = trace("serving_default", pair, StoredWeights([model], "bfloat16")).function.graph
    converted = [tuple(op.inputs[0].shape) for op in graph.get_operations() if op.type == "Cast"]
    assert (8, 50) in converted  # The dense kernel, as a whole.
    # Whole banks only in the branch for batches with places for every expert, embeddings never.
    assert not {(8, 8, 16), (8, 16, 8), (50, 8)} & set(converted)


def test_a_loop_does_not_convert_anew_in_each_turn():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)])
    pair = lambda x: model(tf.map_fn(model, x[None])[0]), [tf.TensorSpec([None, 4])]
    graph = trace("serving_default", pair, StoredWeights([model], "bfloat16")).function.graph
    converted = [tuple(op.inputs[0].shape) for op in graph.get_operations() if op.type == "Cast"]
    assert converted == [(4, 4)]  # The kernel, before the loop and once for both calls.


def test_inputs_and_outputs_have_the_names_of_the_model(tmp_path):
    words = keras.Input((None,), dtype="int32", name="words")
    style = keras.Input((3,), name="style")
    x = keras.layers.Embedding(9, 3)(words) + style[:, None]
    y = keras.layers.Dense(4, "tanh")(x)
    outputs = {"each": y, "mean": keras.layers.GlobalAveragePooling1D()(y)}
    request = {"words": tf.constant([[1, 2]]), "style": tf.ones((1, 3))}
    warm_up = {"serving_default": {name: value.numpy() for name, value in request.items()}}
    for inputs in ([words, style], {"words": words, "style": style}):
        model = keras.Model(inputs, outputs)
        path = keras_moe.export_saved_model(model, tmp_path, warm_up=warm_up)
        served = tf.saved_model.load(path)
        answers = served.signatures["serving_default"](**request)
        expected = model(request if isinstance(inputs, dict) else list(request.values()))
        assert answers.keys() == {"each", "mean"}
        for name, answer in answers.items():
            np.testing.assert_allclose(answer, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("for_cpus")
def test_a_model_without_names_takes_inputs(tmp_path):
    model = keras.Sequential([keras_moe.SparseMoE(4, 5, k=2)])
    x = examples(3)
    model(x)
    answer, _ = export(model, tmp_path, name="inputs")
    np.testing.assert_allclose(answer(x), model(x), rtol=1e-5, atol=1e-6)


def test_tables_in_the_model_and_beside_it_are_exported(tmp_path):
    text = keras.Input((), dtype="string", name="text")
    ids = keras.layers.TextVectorization(vocabulary=["the", "war"])(text)
    model = keras.Model(text, keras.layers.Embedding(4, 2)(ids))
    names = tf.lookup.KeyValueTensorInitializer([2, 3], ["the", "war"])
    table = tf.lookup.StaticHashTable(names, "?")
    signatures = {"words": (lambda ids: table.lookup(ids), [tf.TensorSpec([None], "int32")])}
    path = keras_moe.export_saved_model(model, tmp_path, signatures=signatures, track=[table])
    served = tf.saved_model.load(path).signatures
    asked = tf.constant(["the war", "the peace"])
    np.testing.assert_array_equal(served["serving_default"](text=asked)["outputs"], model(asked))
    assert served["words"](ids=tf.constant([3, 1]))["outputs"].numpy().tolist() == [b"war", b"?"]


@pytest.mark.usefixtures("for_cpus")
def test_a_function_of_tensorflow_is_exported_again_and_again(trained, tmp_path):
    model, x = trained
    function = tf.function(lambda tokens: {"best": tf.argmax(model(tokens), axis=-1)})
    expected = function(x)["best"]
    for dtype in ("bfloat16", None):
        signatures = {"serving_default": (function, [TOKENS])}
        path = keras_moe.export_saved_model(model, tmp_path, None, signatures, dtype=dtype)
        served = tf.saved_model.load(path)
        assert ("bfloat16" in [v.dtype.name for v in served.stored]) == (dtype == "bfloat16")
        if dtype is None:
            answer = served.signatures["serving_default"](tokens=x)["best"]
            np.testing.assert_array_equal(answer, expected)


@pytest.mark.usefixtures("for_cpus")
@pytest.mark.parametrize("dtype", usually(["bfloat16"], [None]))
def test_signatures_use_what_is_tracked(dtype, trained, tmp_path):
    model, _ = trained
    lookup = keras.layers.StringLookup(vocabulary=["a", "b", "c"], mask_token="")
    scale = keras.layers.Rescaling(2.0)
    dense = keras.layers.Dense(3)
    dense.build((None, 50))

    def score(sentences):
        tokens = lookup(tf.strings.split(sentences)).to_tensor()
        return {"scores": dense(scale(model(tokens)))}, tokens

    signatures = {
        "serving_default": (model, [TOKENS]),
        "score": (lambda words: score(words)[0], [tf.TensorSpec([None], "string")]),
    }
    path = keras_moe.export_saved_model(
        model, tmp_path, signatures=signatures, track=[lookup, dense], dtype=dtype
    )
    sentences = tf.constant(["b c", "a", ""])
    served = tf.saved_model.load(path)
    answer = served.signatures["score"](words=sentences)["scores"]
    expected = score(sentences)[0]["scores"]
    tolerance = 1e-5 if dtype is None else 0.02 * np.abs(expected).max()
    np.testing.assert_allclose(answer, expected, rtol=1e-5, atol=tolerance)


@pytest.mark.usefixtures("for_cpus")
def test_a_model_inside_a_strategy_is_exported_for_one_device(tmp_path):
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        model, x = train()
        expected = model.predict(x, verbose=0)
        signatures = {"serving_default": (model, [TOKENS])}
        keras_moe.export_saved_model(model, tmp_path, None, signatures)
    keras_moe.export_saved_model(model, tmp_path, None, signatures, dtype="bfloat16")
    for version, tolerance in (("1", 1e-5), ("2", 0.02 * np.abs(expected).max())):
        served = tf.saved_model.load(tmp_path / version)
        answer = served.signatures["serving_default"](tokens=x)["outputs"]
        np.testing.assert_allclose(answer, expected, rtol=1e-5, atol=tolerance)
        assert_keeps_no_state(served)
