"""`SampledSoftmax`: in training an estimate of the softmax that evaluation computes."""

import numpy as np
import pytest
import tensorflow as tf

from keras_moe.layers import SampledSoftmax

VOCABULARY, WIDTH, WORDS = 40, 8, 50


def made(num_sampled, weights=None):
    softmax = SampledSoftmax(VOCABULARY, num_sampled)
    softmax.build((None, WIDTH))
    if weights is not None:
        softmax.set_weights(weights)
    return softmax


def log_softmax(hidden, kernel, bias):
    logits = hidden.astype("float64") @ kernel + bias
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(WORDS, WIDTH)).astype("float32")
    targets = rng.integers(0, VOCABULARY, size=WORDS)
    weights = [rng.normal(size=shape, scale=0.5) for shape in ((WIDTH, VOCABULARY), (VOCABULARY,))]
    return hidden, targets, weights


def test_evaluation_is_the_whole_softmax_and_draws_nothing(case):
    hidden, _, weights = case
    softmax = made(3, weights)
    np.testing.assert_allclose(softmax(hidden), log_softmax(hidden, *weights), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(softmax(hidden), softmax(hidden))


def mean_of_draws(num_sampled, case, draws=200):
    """Loss of each word, and the gradients of their mean, averaged over draws."""
    hidden, targets, weights = case
    softmax, hidden = made(num_sampled, weights), tf.constant(hidden)

    @tf.function
    def draw():
        with tf.GradientTape() as tape:
            tape.watch(hidden)
            losses = softmax.sampled_loss(hidden, tf.constant(targets))
        sources = [hidden, *(weight.value for weight in softmax.weights)]
        return losses, *map(tf.convert_to_tensor, tape.gradient(losses, sources))

    results = [draw() for _ in range(draws)]
    return [np.mean(parts, axis=0) for parts in zip(*results, strict=True)]


def test_loss_and_gradients_come_closer_to_the_whole_softmax_the_more_is_drawn(case):
    hidden, targets, (kernel, bias) = case
    log_chances = log_softmax(hidden, kernel, bias)
    # Of -log p(target) by the logits: p - 1 for the target, p for the others.
    of_logits = np.exp(log_chances) - np.eye(VOCABULARY)[targets]
    expected = [
        -log_chances[np.arange(WORDS), targets],
        of_logits @ kernel.T,
        hidden.T @ of_logits,
        of_logits.sum(axis=0),
    ]
    tf.random.set_seed(1)
    errors = []
    for num_sampled in (2, 10, VOCABULARY):
        received = mean_of_draws(num_sampled, case)
        errors.append(
            [
                np.linalg.norm(ours - wanted) / np.linalg.norm(wanted)
                for ours, wanted in zip(received, expected, strict=True)
            ]
        )
    few, more, all_words = np.array(errors)
    assert np.all(few > 1.4 * more)
    assert np.all(more > 10 * all_words)
    # With all words drawn only the sampler's estimate of their chances, nearly 1, is not exact.
    assert np.all(all_words < 0.05)


def test_loss_and_gradients_are_those_of_tensorflow(case):
    hidden, targets, weights = case
    softmax, hidden = made(12, weights), tf.constant(hidden)
    softmax.seed = 5
    kernel, bias = (weight.value for weight in softmax.weights)

    @tf.function
    def theirs():
        return tf.nn.sampled_softmax_loss(
            tf.transpose(kernel), bias, targets[:, None], hidden, 12, VOCABULARY, seed=5
        )

    @tf.function
    def ours():
        return softmax.sampled_loss(hidden, tf.constant(targets))

    results = []
    for loss in (ours, theirs):
        tf.random.set_seed(1)  # Both draw the same words.
        with tf.GradientTape() as tape:
            tape.watch(hidden)
            losses = loss()
        gradients = tape.gradient(losses, [hidden, kernel, bias])
        results.append([losses, *map(tf.convert_to_tensor, gradients)])
    for mine, wanted in zip(*results, strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-4, atol=1e-6)


def test_no_more_words_are_drawn_than_there_are():
    assert SampledSoftmax(VOCABULARY, 1000).num_sampled == VOCABULARY


def test_config_round_trip():
    softmax = SampledSoftmax(VOCABULARY, 7, seed=3, name="softmax")
    again = SampledSoftmax.from_config(softmax.get_config())
    assert again.get_config() == softmax.get_config()
    assert (again.units, again.num_sampled, again.seed) == (VOCABULARY, 7, 3)


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0)])
def test_bad_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="Received: .*0"):
        SampledSoftmax(*sizes)
