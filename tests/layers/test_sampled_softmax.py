"""`SampledSoftmax`: in training an estimate of the softmax that evaluation computes."""

import keras
import numpy as np
import pytest
from gradients import steps
from keras import ops
from keras.ops import convert_to_numpy as numpy

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


def sampled_steps(softmax, hidden, targets):
    """A function that draws words: the loss of each target, then gradients of the losses' sum.

    Those by the hidden states, the kernel and the bias.
    """

    def step(hidden, targets):
        losses = softmax.sampled_loss(hidden, targets)
        return ops.sum(losses), losses

    step.layer = softmax
    weights = [softmax.kernel, softmax.bias]
    draw = steps(step, [hidden, targets], weights, "graph", slices=True)

    def call():
        losses, by_hidden, by_weights = draw()
        return [numpy(x) for x in (losses, *by_hidden, *by_weights)]

    return call


def mean_of_draws(num_sampled, case, draws=200):
    """Loss of each word, and the gradients of their mean, averaged over draws."""
    hidden, targets, weights = case
    softmax = made(num_sampled, weights)
    draw = sampled_steps(softmax, hidden, targets)
    return [np.mean(parts, axis=0) for parts in zip(*(draw() for _ in range(draws)), strict=True)]


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
    keras.utils.set_random_seed(1)
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


def test_loss_and_gradients_of_a_draw_are_those_of_its_formula(case):
    hidden, targets, (kernel, bias) = case
    softmax = made(5, (kernel, bias))
    # Of a word drawn that some of the targets are, and of others; of chances as they may be.
    drawn = np.array([targets[0], targets[1], *sorted(set(range(VOCABULARY)) - {*targets[:2]})[:3]])
    all_chances = np.linspace(0.9, 0.01, VOCABULARY)
    found = [
        drawn.astype("int32"),
        *(all_chances[ids].astype("float32") for ids in (targets, drawn)),
    ]
    softmax._sampler = lambda targets, seed: [ops.convert_to_tensor(x) for x in found]

    corrected = bias - np.log(all_chances)
    target = np.sum(hidden * kernel.T[targets], axis=1) + corrected[targets]
    others = hidden @ kernel[:, drawn] + corrected[drawn]
    others[drawn == targets[:, None]] = -np.inf  # A word is no rival of itself.
    logits = np.concatenate([target[:, None], others], axis=1)
    total = np.exp(logits).sum(axis=1)
    # -log of the softmax of the target, whose derivative by its logit is p - 1, by the others' p.
    words = np.concatenate([targets[:, None], np.tile(drawn, (WORDS, 1))], axis=1)
    of_logits = np.exp(logits) / total[:, None] - np.eye(6)[0]
    by_kernel, by_bias = np.zeros_like(kernel), np.zeros_like(bias)
    np.add.at(by_kernel.T, words, of_logits[..., None] * hidden[:, None])
    np.add.at(by_bias, words, of_logits)
    by_hidden = np.einsum("tw,twd->td", of_logits, kernel.T[words])
    expected = [np.log(total) - target, by_hidden, by_kernel, by_bias]

    received = sampled_steps(softmax, hidden, targets)()
    for ours, wanted in zip(received, expected, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5)


def test_words_are_drawn_once_each_and_as_often_as_the_sampler_tells():
    softmax, times = made(10), 400
    keras.utils.set_random_seed(1)
    every_word = np.arange(VOCABULARY)
    seen, told = np.zeros(VOCABULARY), np.zeros(VOCABULARY)
    for _ in range(times):
        drawn, chances, of_drawn = map(numpy, softmax._sampler(every_word, None))
        assert len(set(drawn)) == len(drawn) == 10
        np.testing.assert_allclose(of_drawn, chances[drawn], rtol=1e-5)
        seen[drawn] += 1 / times
        told += chances / times
    # Frequencies are off by sqrt(1/4 / 400) = 0.025 at most, of 40 the largest by 3.2 times that.
    np.testing.assert_allclose(seen, told, atol=0.1)
    # Common words more often: in one draw word 0 has the chance log 2 / log 41 = 0.19, and the
    # last one log(41/40) / log 41 = 0.007.
    assert told[0] > 0.8 and told[-1] < 0.15


@pytest.mark.tensorflow("it compares with what only TensorFlow has")
def test_loss_and_gradients_are_those_of_tensorflow(case):
    import tensorflow as tf

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
