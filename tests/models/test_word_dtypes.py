"""Models of words in every precision, and ids in every type in which data sets store them."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from combinations import covering, usually
from keras.ops import convert_to_numpy as numpy
from word_models import MODELS, SOURCE, TARGETS, TOKENS, VOCABULARY, inputs, losses, make

import keras_moe
from keras_moe.layers import (
    AdditiveAttention,
    AttentionLSTM,
    ProductAttention,
    ProjectedLSTM,
    SampledSoftmax,
)
from keras_moe.models import LanguageModel, beam_search, generate
from keras_moe.optimizers import FactoredAdam

pytestmark = pytest.mark.usefixtures("for_cpus")
POLICIES = ("float64", "mixed_bfloat16", "mixed_float16", "bfloat16", "float16")
# Rounding of numbers of about 1 in each precision, several times over.
TOLERANCE = {"float64": 1e-5, "bfloat16": 0.1, "float16": 0.02}
IDS = ("uint8", "uint16", "int16", "uint32", "int64", "float32", "float64")
USUAL_IDS = usually(["uint8", "int64", "float32"], ["uint16", "int16", "uint32", "float64"])


@pytest.fixture
def floatx(request):
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx(request.param)
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_floatx(before[0])
    keras.config.set_dtype_policy(before[1])


def check(model, name, tmp_path, eager=False):
    """Trains, evaluates, saves, loads and exports it."""
    model.compile(
        FactoredAdam(0.01), run_eagerly=eager
    )  # In bfloat16 the second moment of Keras' Adam stays 0.
    x = inputs(name)
    before = model.evaluate(x, TARGETS, verbose=0, return_dict=True)
    of_words = losses(model, name)
    np.testing.assert_allclose(before["perplexity"], np.exp(of_words.sum() / 9), rtol=5e-3)
    weights, held_out = np.array([1.0, 2.0, 0.5]), (x, TARGETS)
    history = model.fit(
        x, TARGETS, sample_weight=weights, validation_data=held_out, verbose=0
    ).history
    assert all(np.isfinite(float(values[0])) for values in history.values())
    after = model.evaluate(x, TARGETS, verbose=0, return_dict=True)
    assert after["perplexity"] < before["perplexity"]

    predictions = model.predict(x, verbose=0)
    assert predictions.dtype == ("float64" if model.compute_dtype == "float64" else "float32")
    np.testing.assert_allclose(np.exp(predictions).sum(axis=-1), np.ones((3, 4)), rtol=1e-5)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.dtype_policy.name == model.dtype_policy.name
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), predictions)
    logs = loaded.evaluate(x, TARGETS, verbose=0)
    assert all(np.isfinite(float(value)) for value in logs)  # Keras leaves bfloat16 as tensors.

    specs = tf.nest.map_structure(lambda x: tf.TensorSpec([None, None], x.dtype), x)
    if name == "translation":
        specs = tuple(tf.TensorSpec(s.shape, s.dtype, f"ids_{i}") for i, s in enumerate(specs))
    signatures = {"serving_default": (model, [specs])}
    served = tf.saved_model.load(
        keras_moe.export_saved_model(model, tmp_path / "exported", signatures=signatures)
    ).signatures["serving_default"]
    names = served.structured_input_signature[1]
    arrays = dict(zip(sorted(names), x if name == "translation" else [x], strict=True))
    answer = served(**{key: tf.constant(value) for key, value in arrays.items()})["outputs"]
    np.testing.assert_allclose(answer, predictions, rtol=0.05, atol=0.05)


@covering(
    usual=[("language", "float16"), ("translation", "mixed_bfloat16")],
    name=MODELS,
    policy=POLICIES,
)
def test_a_model_with_mixtures_works_in_any_precision(name, policy, tmp_path):
    eager = name == "translation"  # Its graphs take longest to trace.
    check(make(name, middle=True, dtype=policy), name, tmp_path, eager)


@pytest.mark.exhaustive  # What it is made of is tried below: the loss, and models of this floatx.
@pytest.mark.parametrize("policy", ["float64", "float16"])
def test_words_are_sampled_in_any_precision(policy, tmp_path):
    check(make("language", num_sampled=5, dtype=policy), "language", tmp_path)


@covering(
    usual=[("language", "float16"), ("translation", "float64")],
    indirect=["floatx"],
    name=MODELS,
    floatx=["float64", "float16", "bfloat16"],
)
def test_a_model_works_in_any_precision_of_keras(name, floatx, tmp_path):
    check(make(name, middle=True, num_sampled=5), name, tmp_path, eager=True)


@pytest.mark.parametrize("policy", ["float64", "bfloat16"])
def test_losses_of_several_precisions_are_added_up(policy):
    moe = keras_moe.SparseMoE(3, 4, k=2, kernel_regularizer="l2", dtype=policy)
    model = LanguageModel(VOCABULARY, 8, moe, dtype="mixed_bfloat16", num_sampled=5)
    model.compile("sgd", run_eagerly=True)
    assert np.isfinite(model.fit(TOKENS, TARGETS, verbose=0).history["loss"]).all()
    assert np.isfinite(model.evaluate(TOKENS, TARGETS, verbose=0)).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_sampled_loss_is_that_of_float32(policy):
    rng = np.random.default_rng(0)
    hidden, targets = rng.normal(size=(50, 8)), rng.integers(0, 40, size=50)
    results = []
    for num_sampled in (None, 6):
        for dtype in (policy, "float32"):
            layer = SampledSoftmax(40, num_sampled, seed=3, dtype=dtype)
            layer.build((None, 8))
            weights = np.random.default_rng(1)
            layer.set_weights([weights.normal(size=w.shape, scale=0.3) for w in layer.weights])

            @tf.function
            def loss(layer=layer):
                return layer.sampled_loss(tf.constant(hidden, layer.compute_dtype), targets)

            tf.random.set_seed(1)  # The same words are drawn.
            results.append(loss())
            assert results[-1].dtype == ("float64" if dtype == "float64" else "float32")
    tolerance = TOLERANCE[policy.removeprefix("mixed_")]
    for ours, wanted in (results[:2], results[2:]):
        np.testing.assert_allclose(ours, wanted, rtol=tolerance, atol=tolerance)


LAYERS = {
    "ProjectedLSTM": (lambda **kw: ProjectedLSTM(6, 4, return_sequences=True, **kw), 1),
    "ProductAttention": (lambda **kw: ProductAttention(5, **kw), 2),
    "AdditiveAttention": (lambda **kw: AdditiveAttention(5, **kw), 2),
    "product AttentionLSTM": (lambda **kw: AttentionLSTM(6, 4, **kw), 2),
    "additive AttentionLSTM": (lambda **kw: AttentionLSTM(6, 4, "additive", **kw), 2),
    "SampledSoftmax": (lambda **kw: SampledSoftmax(7, **kw), 1),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_compute_in_their_own_precision(layer, policy):
    make_layer, number = LAYERS[layer]
    rng = np.random.default_rng(0)
    sequences = [rng.normal(size=(2, length, 4)) for length in (3, 5)[:number]]
    mask = np.array([[True] * 5, [True, True, False, False, False]])
    results = []
    for dtype in (policy, "float32"):
        layer = make_layer(dtype=dtype)
        x = [tf.constant(part, layer.compute_dtype) for part in sequences]

        def call(layer=layer, x=x):
            if isinstance(layer, AttentionLSTM):
                return layer(*x, source_mask=mask)
            if number == 2:
                return layer(x, mask=[None, mask])
            return layer(x[0])

        call()
        weights = np.random.default_rng(1)
        for variable in layer.weights:
            variable.assign(weights.normal(size=variable.shape, scale=0.5))
        with tf.GradientTape() as tape:
            y = call()
        assert y.dtype == layer.compute_dtype
        gradients = tape.gradient(y, layer.trainable_weights)
        results.append([y, *gradients])
    tolerance = TOLERANCE[policy.removeprefix("mixed_")]
    for ours, wanted in zip(*results, strict=True):
        ours, wanted = (numpy(tf.cast(part, tf.float64)) for part in (ours, wanted))
        assert np.linalg.norm(ours - wanted) <= tolerance * max(np.linalg.norm(wanted), 1.0)


def test_attention_is_as_precise_as_float64():
    rng = np.random.default_rng(0)
    query, value = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 5, 4))
    layer = ProductAttention(6, dtype="float64")
    context, weights = layer([query, value], return_attention_scores=True)
    kernels = [numpy(w) for w in (layer.query_kernel, layer.key_kernel, layer.scale)]
    hidden = np.tanh(query @ kernels[0]) * kernels[2]
    scores = np.exp(hidden @ np.tanh(value @ kernels[1]).swapaxes(1, 2))
    expected = scores / scores.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    np.testing.assert_allclose(context, expected @ value, rtol=1e-12)


def results_with(name, num_sampled, dtype, run_eagerly):
    """What training, evaluation, prediction and a call make of ids of a type."""
    model, x = make(name, num_sampled=num_sampled), inputs(name, dtype)
    model.compile("sgd", run_eagerly=run_eagerly)
    data = x, TARGETS.astype(dtype)
    history = model.fit(*data, validation_data=data, verbose=0).history
    evaluated = model.evaluate(tf.data.Dataset.from_tensors(data), verbose=0)
    return [*history["val_loss"], evaluated, model.predict(x, verbose=0), model(x)]


@pytest.mark.parametrize(
    ("name", "num_sampled", "types", "in_graph"),
    [
        ("language", None, IDS, ["uint8", "float32"]),
        ("language", 5, IDS[:1], []),
        ("translation", None, IDS, ["float32"]),
    ],
)
def test_ids_are_taken_in_any_type(name, num_sampled, types, in_graph):
    wanted = results_with(name, num_sampled, "int32", run_eagerly=True)
    for ids in types:
        received = results_with(name, num_sampled, ids, run_eagerly=ids not in in_graph)
        for ours, theirs in zip(received, wanted, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, err_msg=ids)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float16"])
def test_large_ids_in_floating_point_stay_what_they_are(policy):
    # Bfloat16 tells apart integers up to 2^8 = 256, float16 up to 2^11 = 2048.
    model = LanguageModel(5000, 4, dtype=policy, num_sampled=None)
    model.compile("sgd", metrics=["accuracy"])
    model.build((None, None))
    ids = np.array([[4001, 257, 2049, 4999]])
    kernel, bias = model.softmax.kernel, numpy(model.softmax.bias)
    kernel.assign(np.zeros(kernel.shape))
    bias[4001] = 5.0  # What it always guesses.
    model.softmax.bias.assign(bias)
    np.testing.assert_array_equal(model(ids.astype("float32")), model(ids))
    targets = np.array([[4001, 4000, 4002, 4001]], "float32")
    logs = model.evaluate(ids.astype("float32"), targets, verbose=0, return_dict=True)
    assert logs["accuracy"] == 0.5


@pytest.mark.parametrize("ids", USUAL_IDS)
def test_translation_takes_ids_in_any_type(ids):
    model = make("translation", middle=True)
    wanted = model.translate(SOURCE, end_id=2, excluded=[1])
    received = model.translate(
        SOURCE.astype(ids), end_id=np.array(2, ids)[()], excluded=np.array([1], ids)
    )
    for ours, theirs in zip(received, wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert received.ids.dtype == "int32"


@pytest.mark.parametrize("ids", IDS)
def test_beam_search_takes_ids_in_any_type(ids):
    def step(words, state):
        return tf.gather(tf.math.log(tf.constant([[0.5, 0.2, 0.3]] * 3)), words), state, None

    results = [
        beam_search(
            step,
            (),
            np.array([2, 2], dtype),
            end_id=np.array(2, dtype)[()],
            max_length=np.array([3, 4], dtype),
            coverage_penalty=0.0,
        )
        for dtype in ("int32", ids)
    ]
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("ids", IDS)
def test_generation_takes_ids_in_any_type(ids):
    model = LanguageModel(400, 4, seed=0)
    prompts = [np.array([100, 120], ids), np.array([], ids)]
    options = {"excluded": np.array([0, 1], ids), "max_words": 4, "seed": 1}
    # Of an `eos_id` in uint8 the other ids must not be cut to 8 bits.
    received = generate(model, prompts, np.array(2, ids)[()], **options)
    assert received == generate(model, [[100, 120], []], 2, **options)
    assert all(type(word) is int for sentence in received for word in sentence)
