"""A loss and metrics given to `compile` see a model of words' log-probabilities, always."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops
from word_models import MODELS, TARGETS, TOKENS, VOCABULARY, inputs, losses, make

from keras_moe.models import LanguageModel

WEIGHTS = np.array([0.5, 2.0, 0.0])
CROSS_ENTROPY = "sparse_categorical_crossentropy"
# Before 3.12 Keras' own metrics leave out padding only if they have weights.
KERAS_LEAVES_OUT_PADDING = tuple(map(int, keras.__version__.split(".")[:2])) >= (3, 12)


def total_chance(targets, log_probs):
    """1 for each word, if these are log-probabilities over the vocabulary."""
    assert targets.shape[1:] == (4,) and log_probs.shape[1:] == (4, VOCABULARY)
    return ops.sum(ops.exp(log_probs), axis=-1)


def own_cross_entropy(targets, log_probs):
    chosen = ops.one_hot(ops.cast(targets, "int32"), VOCABULARY, dtype=log_probs.dtype)
    return -ops.sum(chosen * log_probs, axis=-1)


LOSSES = {
    "name": CROSS_ENTROPY,
    "class name": "SparseCategoricalCrossentropy",
    "short name": "ce",
    "function": keras.losses.sparse_categorical_crossentropy,
    "of probabilities": keras.losses.SparseCategoricalCrossentropy(),
    "of logits": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    "own": own_cross_entropy,
    "list": [CROSS_ENTROPY],
}


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_metrics_see_the_same_in_training_as_in_evaluation(name, eager):
    model = make(name)
    model.compile(
        keras.optimizers.SGD(0.0),
        metrics=["accuracy", total_chance, CROSS_ENTROPY],
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy(name="weighted")],
        run_eagerly=eager,
    )
    x, of_words = inputs(name), TARGETS > 0
    hits = np.argmax(model(x), axis=-1) == TARGETS
    counted = of_words if KERAS_LEAVES_OUT_PADDING else np.ones_like(of_words)
    log_probs = ops.convert_to_numpy(model(x))
    entropies = -np.take_along_axis(log_probs, TARGETS[..., None], axis=-1)[..., 0]
    weights = WEIGHTS[:, None] * of_words
    expected = {
        "accuracy": np.mean(hits[counted]),
        "total_chance": 1.0,
        CROSS_ENTROPY: np.mean(entropies[counted]),
        "weighted": np.sum(hits * weights) / np.sum(weights),
    }
    data = {"sample_weight": WEIGHTS, "validation_data": (x, TARGETS, WEIGHTS)}
    history = model.fit(x, TARGETS, **data, verbose=0).history
    evaluated = model.evaluate(x, TARGETS, sample_weight=WEIGHTS, verbose=0, return_dict=True)
    for metric, wanted in expected.items():
        received = [history[metric][0], history[f"val_{metric}"][0], evaluated[metric]]
        np.testing.assert_allclose(received, [wanted] * 3, rtol=1e-5, err_msg=metric)


@functools.cache
def results_with(name, loss, eager):
    """The numbers of evaluation and training with a loss of `LOSSES`, or with none given."""
    model = make(name)
    model.compile(keras.optimizers.SGD(0.5), loss=LOSSES.get(loss), run_eagerly=eager)
    x, data = inputs(name), {"sample_weight": WEIGHTS, "verbose": 0}
    evaluated = model.evaluate(x, TARGETS, **data)
    history = model.fit(x, TARGETS, **data).history
    return [*evaluated, *history["loss"], *history["perplexity"], *model.get_weights()]


@pytest.mark.parametrize(("loss", "eager"), [*((loss, True) for loss in LOSSES), ("name", False)])
@pytest.mark.parametrize("name", MODELS)
def test_a_cross_entropy_given_is_the_models_own(name, loss, eager):
    received = results_with(name, loss, eager), results_with(name, None, eager=True)
    for ours, theirs in zip(*received, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_loss_takes_the_place_of_the_cross_entropy_but_not_of_the_balance_losses():
    model = make("language", middle=True)
    model.compile("sgd", loss=total_chance, loss_weights=0.25)
    logs = model.evaluate(TOKENS, TARGETS, verbose=0, return_dict=True)
    balance = 0.1 * (logs["moe_0/cv_importance"] ** 2 + logs["moe_0/cv_load"] ** 2)
    np.testing.assert_allclose(logs["loss"], 0.25 + balance, rtol=1e-5)
    wanted = np.exp(np.sum(losses(model, "language")) / 9)  # the perplexity, of 9 words
    np.testing.assert_allclose(logs["perplexity"], wanted, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "given", [{"loss": CROSS_ENTROPY}, {"metrics": ["accuracy"]}, {"weighted_metrics": ["acc"]}]
)
def test_a_sample_of_the_vocabulary_is_refused_where_all_of_it_is_needed(name, given):
    model = make(name, num_sampled=5)
    model.compile("sgd", run_eagerly=True, **given)
    x = inputs(name)
    assert np.isfinite(model.evaluate(x, TARGETS, verbose=0)).all()
    with pytest.raises(ValueError, match="`num_sampled=None`.*Received: num_sampled=5, loss="):
        model.fit(x, TARGETS, verbose=0)
    with pytest.raises(ValueError, match="`num_sampled=None`"):
        model.train_on_batch(x, TARGETS)


def test_what_could_only_be_computed_wrongly_is_refused():
    model = make("language")
    with pytest.raises(ValueError, match="with `from_logits=True`. Received: <Sparse"):
        model.compile("sgd", metrics=[keras.metrics.SparseCategoricalCrossentropy()])
    with pytest.raises(ValueError, match="`loss_weights` weighs.*Received: loss_weights=0.5"):
        model.compile("sgd", loss_weights=0.5)


def test_what_was_compiled_comes_back_from_a_file(tmp_path):
    model = make("language")
    model.compile("sgd", loss=CROSS_ENTROPY, metrics=["accuracy", CROSS_ENTROPY])
    before = model.evaluate(TOKENS, TARGETS, verbose=0, return_dict=True)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    after = loaded.evaluate(TOKENS, TARGETS, verbose=0, return_dict=True)
    assert before.keys() == after.keys() == {"loss", "accuracy", CROSS_ENTROPY, "perplexity"}
    np.testing.assert_allclose([*after.values()], [*before.values()], rtol=1e-6)


@pytest.mark.parametrize("num_sampled", [None, 5])
@pytest.mark.parametrize("kind", ["functional", "subclass"])
def test_a_model_inside_another_one_gives_it_log_probabilities(kind, num_sampled):
    inner = make("language", num_sampled=num_sampled)
    if kind == "functional":
        tokens = keras.Input((None,), dtype="int32")
        outer = keras.Model(tokens, inner(tokens))
    else:
        outer = Around(inner)
    outer.compile(
        keras.optimizers.SGD(0.0),
        loss=LOSSES["of logits"],
        metrics=[total_chance],
        run_eagerly=num_sampled is None,
    )
    data = TOKENS[:1], TARGETS[:1]  # without padding, which the other model knows nothing of
    history = outer.fit(*data, validation_data=data, verbose=0).history
    wanted = np.mean(losses(inner, "language")[:1])
    np.testing.assert_allclose(history["loss"] + history["val_loss"], [wanted] * 2, rtol=1e-5)
    np.testing.assert_allclose(history["total_chance"], [1.0], rtol=1e-5)


class Around(keras.Model):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def call(self, tokens):
        return self.inner(tokens)


@pytest.mark.parametrize("metrics", [None, ["accuracy"]])
def test_a_step_computes_the_whole_softmax_only_where_a_metric_needs_it(metrics):
    model = LanguageModel(VOCABULARY, 8, num_sampled=None)
    model.build((None, None))
    model.compile("sgd", metrics=metrics)
    model.train_on_batch(TOKENS, TARGETS)  # The optimizer has its variables.
    data = tf.constant(TOKENS, tf.int32), tf.constant(TARGETS, tf.int32)
    graph = tf.function(model.train_step).get_concrete_function(data).graph
    # A function runs what leads to its outputs and to what writes, and nothing else.
    waiting = [tensor.op for tensor in graph.outputs] + list(graph.control_outputs)
    run = set()
    while waiting:
        operation = waiting.pop()
        if operation not in run:
            run.add(operation)
            waiting += [tensor.op for tensor in operation.inputs] + operation.control_inputs
    types = {operation.type for operation in run}
    assert "SparseSoftmaxCrossEntropyWithLogits" in types
    assert ("LogSoftmax" in types) == (metrics is not None)
