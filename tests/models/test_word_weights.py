"""Models of words weigh words as `fit` is told: `sample_weight` and `class_weight`."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.ops import convert_to_numpy as numpy
from word_models import MODELS, TARGETS, TOKENS, VOCABULARY, inputs, losses, make

RATE = 0.5
OF_TEXTS = np.array([0.5, 2.0, 0.0])
OF_WORDS = np.array([[1.0, 0.0, 2.0, 0.5], [3.0, 1.0, 7.0, 7.0], [0.0, 1.0, 0.5, 7.0]])
CLASSES = {0: 9.0, 2: 0.5, 5: 3.0, 9: 0.0}
TABLE = np.array([CLASSES.get(i, 1.0) for i in range(VOCABULARY)])
NUM_WORDS = 9
WEIGHTS = {
    "texts": OF_TEXTS,
    "column": OF_TEXTS[:, None],
    "words": OF_WORDS,
    "integers": np.array([2, 0, 1], "uint8"),
    "mask": np.array([True, False, True]),
}


def compiled(name, eager=True, **options):
    """A model, by default without a graph, which takes longer to trace than all its steps."""
    model = make(name, **options)
    model.compile(keras.optimizers.SGD(RATE), run_eagerly=eager)
    return model


def spread(weights):
    """Weights [B], [B, 1] or [B, L] as [B, L], zeros for padding."""
    weights = weights.reshape(3, -1) * np.ones((3, 4))
    return np.where(TARGETS > 0, weights, 0.0)


def expected_logs(model, name, weights):
    weights, of_words = spread(weights), losses(model, name)
    # The sum of weighted losses over the 4 + 2 + 3 words; the perplexity of the weighted mean.
    loss = np.sum(weights * of_words) / NUM_WORDS
    return {"loss": loss, "perplexity": np.exp(np.sum(weights * of_words) / np.sum(weights))}


def expected_step(model, name, weights):
    """The weights of a model after a step of gradient descent."""
    with tf.GradientTape() as tape:
        log_probs = model(inputs(name))
        nll = -tf.gather(log_probs, TARGETS, batch_dims=2)
        loss = tf.reduce_sum(nll * tf.constant(spread(weights), nll.dtype)) / NUM_WORDS
    gradients = tape.gradient(loss, [v.value for v in model.trainable_variables])
    return [
        numpy(v) - RATE * numpy(tf.convert_to_tensor(g))
        for v, g in zip(model.trainable_variables, gradients, strict=True)
    ]


def assert_stepped(model, expected):
    for variable, wanted in zip(model.trainable_variables, expected, strict=True):
        np.testing.assert_allclose(variable, wanted, rtol=1e-4, atol=1e-6, err_msg=variable.path)


def assert_logs(logs, expected):
    for name, wanted in expected.items():
        np.testing.assert_allclose(logs[name], wanted, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", MODELS)
def test_weights_weigh_words_in_evaluation_and_in_a_step(name, weights):
    model = compiled(name, eager=(name, weights) != ("language", "column"))
    weights = WEIGHTS[weights]
    expected, after = expected_logs(model, name, weights), expected_step(model, name, weights)
    x = inputs(name)
    logs = model.evaluate(x, TARGETS, sample_weight=weights, verbose=0, return_dict=True)
    assert_logs(logs, expected)
    assert_logs(model.test_on_batch(x, TARGETS, sample_weight=weights, return_dict=True), expected)
    model.reset_metrics()
    logs = model.train_on_batch(x, TARGETS, sample_weight=weights, return_dict=True)
    assert_logs(logs, expected)
    assert_stepped(model, after)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_weights_come_in_a_dataset_and_in_validation_data(name, eager):
    model = make(name)
    model.compile(keras.optimizers.SGD(RATE), run_eagerly=eager)
    expected, after = expected_logs(model, name, OF_WORDS), expected_step(model, name, OF_WORDS)
    data = tf.data.Dataset.from_tensors((inputs(name), TARGETS, OF_WORDS))
    held_out = (inputs(name), TARGETS, OF_TEXTS)
    history = model.fit(data, validation_data=held_out, shuffle=False, verbose=0).history
    assert_logs({k: v[0] for k, v in history.items()}, expected)
    assert_stepped(model, after)
    wanted = expected_logs(model, name, OF_TEXTS)
    assert_logs({k: history[f"val_{k}"][0] for k in wanted}, wanted)


def test_as_many_texts_as_words_are_still_texts():
    square, y = TOKENS[:, :3], TARGETS[:, :3]
    model = compiled("language")
    received = model.evaluate(square, y, sample_weight=OF_TEXTS, verbose=0)
    by_word = np.repeat(OF_TEXTS[:, None], 3, axis=1)
    np.testing.assert_allclose(
        received, model.evaluate(square, y, sample_weight=by_word, verbose=0), rtol=1e-6
    )


@pytest.mark.parametrize("num_sampled", [None, 5])
@pytest.mark.parametrize("name", MODELS)
def test_weights_of_zero_move_nothing(name, num_sampled):
    model = compiled(name, eager=(name, num_sampled) != ("language", 5), num_sampled=num_sampled)
    before = model.get_weights()
    model.fit(inputs(name), TARGETS, sample_weight=np.zeros(3), verbose=0)
    model.fit(inputs(name), TARGETS, sample_weight=np.zeros((3, 4)), verbose=0)
    model.fit(inputs(name), TARGETS, class_weight=dict.fromkeys(range(20), 0.0), verbose=0)
    np.testing.assert_equal(model.get_weights(), before)
    model.fit(inputs(name), TARGETS, sample_weight=np.ones(3), verbose=0)
    assert all(np.any(a != b) for a, b in zip(model.get_weights(), before, strict=True))


def test_the_balance_losses_of_a_mixture_have_no_weight():
    model = compiled("language", middle=True)
    logs = model.evaluate(TOKENS, TARGETS, sample_weight=np.zeros(3), verbose=0, return_dict=True)
    balance = 0.1 * (logs["moe_0/cv_importance"] ** 2 + logs["moe_0/cv_load"] ** 2)
    assert balance > 0
    np.testing.assert_allclose(logs["loss"], balance, rtol=1e-5)


@pytest.mark.parametrize("given", ["arrays", "dataset", "generator", "batch"])
@pytest.mark.parametrize("name", MODELS)
def test_a_class_weight_is_that_of_every_word_with_this_id(name, given):
    model, x = compiled(name, eager=given in ("generator", "batch")), inputs(name)
    expected, after = (f(model, name, TABLE[TARGETS]) for f in (expected_logs, expected_step))
    if given == "batch":
        logs = model.train_on_batch(x, TARGETS, class_weight=CLASSES, return_dict=True)
    else:
        data = {
            "arrays": (x, TARGETS),
            "dataset": (tf.data.Dataset.from_tensors((x, TARGETS)),),
            "generator": ((batch for batch in [(x, TARGETS)] * 3),),
        }[given]
        options = {"steps_per_epoch": 1, "shuffle": False, "verbose": 0}
        history = model.fit(*data, class_weight=CLASSES, **options).history
        logs = {name: values[0] for name, values in history.items()}
    assert_logs(logs, expected)
    assert_stepped(model, after)


def test_class_weights_are_of_one_fit_and_not_of_its_validation():
    model, weights = compiled("language", eager=False), []
    x, y = np.concatenate([TOKENS] * 2), np.concatenate([TARGETS] * 2)
    for class_weight in (CLASSES, {5: 0.0}, None):
        table = np.array([(class_weight or {}).get(i, 1.0) for i in range(VOCABULARY)])
        weights = [table[TARGETS], np.ones((3, 4))]
        expected = [expected_logs(model, "language", w)["perplexity"] for w in weights[:1]]
        history = model.fit(
            x, y, 3, class_weight=class_weight, validation_split=0.5, verbose=0
        ).history
        expected.append(expected_logs(model, "language", weights[1])["perplexity"])
        received = history["perplexity"] + history["val_perplexity"]
        np.testing.assert_allclose(received, expected, rtol=1e-5)


def test_weights_that_fit_nothing_are_refused():
    model = compiled("language", eager=False)
    for weights in (np.ones((3, 2)), np.ones((3, 4, 1))):
        with pytest.raises(ValueError, match=r"`sample_weight` must.*Received: shape \(None, "):
            model.evaluate(TOKENS, TARGETS, sample_weight=weights, verbose=0)
    with pytest.raises(ValueError, match="ids below 20.*Received: {20: 1.0}"):
        model.fit(TOKENS, TARGETS, class_weight={20: 1.0}, verbose=0)
    with pytest.raises(ValueError, match="can't be given at the same time"):
        model.fit(TOKENS, TARGETS, class_weight=CLASSES, sample_weight=OF_TEXTS, verbose=0)


def test_weights_count_alike_on_two_replicas():
    # Each replica has one text of 4 words: the mean of both means is that of all words.
    x, y = np.repeat(TOKENS[:1], 2, axis=0), np.array([TARGETS[0], TARGETS[0][::-1]])
    results = []
    for strategy in (tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), None):
        with strategy.scope() if strategy else tf.name_scope("alone"):
            model = compiled("language", eager=strategy is None)
        history = model.fit(x, y, sample_weight=OF_WORDS[:2], shuffle=False, verbose=0).history
        results.append([*history["loss"], *history["perplexity"], *model.get_weights()])
    for ours, wanted in zip(*results, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-6)


def test_weights_count_in_accumulated_gradients():
    model = make("language")
    optimizer = keras.optimizers.SGD(RATE, gradient_accumulation_steps=2)
    model.compile(optimizer, run_eagerly=True)
    halves = [expected_step(model, "language", w) for w in (OF_TEXTS, OF_WORDS)]
    for weights in (OF_TEXTS, OF_WORDS):
        model.train_on_batch(TOKENS, TARGETS, sample_weight=weights)
    # One step along the mean of both gradients.
    assert_stepped(model, [(a + b) / 2 for a, b in zip(*halves, strict=True)])
