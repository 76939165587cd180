"""The gating that doesn't see what all words have in common."""

import numpy as np
import pytest
from keras.ops import convert_to_numpy as numpy
from normalized_gating import NormalizedGating

COMMON = np.array([30.0, -20.0, 10.0, 5.0], "float32")
MASK = np.arange(12) % 3 > 0


@pytest.fixture
def words():
    return np.random.default_rng(0).normal(size=(12, 4)).astype("float32")


def made(**options):
    gating = NormalizedGating(5, 2, noise=False, **options)
    gating.build((None, 4))
    gating.gate_kernel.assign(np.random.default_rng(1).normal(size=(4, 5)))
    return gating


def test_words_are_normalized_over_those_that_count(words):
    words[~MASK] = 1e4
    gating = made()
    routing = gating(words + COMMON, training=True, mask=MASK)
    counted = words[MASK]
    # Mean 0 and variance 1 of each feature, with Keras' ε of 0.001, and from there top 2 of 5.
    z = (counted - counted.mean(axis=0)) / np.sqrt(counted.var(axis=0) + 1e-3)
    logits = z @ numpy(gating.gate_kernel)
    expected = np.argsort(-logits, axis=1)[:, :2]
    np.testing.assert_array_equal(numpy(routing.expert_index)[MASK], expected)
    best = np.exp(np.take_along_axis(logits, expected, axis=1))
    gates = best / best.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(numpy(routing.gates)[MASK], gates, rtol=1e-3)
    np.testing.assert_array_equal(numpy(routing.gates)[~MASK], 0)


def test_in_use_neighbours_are_of_no_matter_and_the_averages_are_those_of_training(words):
    gating = made()
    for _ in range(200):  # 0.95²⁰⁰ = 0.00004 of the initial averages are left.
        in_training = gating(words + COMMON, training=True)
    in_use = gating(words + COMMON)
    np.testing.assert_array_equal(in_use.expert_index, in_training.expert_index)
    np.testing.assert_allclose(in_use.gates, in_training.gates, atol=0.02)
    alone = gating(words[:1] + COMMON)
    np.testing.assert_allclose(alone.gates, in_use.gates[:1], rtol=1e-5)


def test_a_configuration_makes_the_same():
    gating = made(noise_epsilon=0.3)
    again = NormalizedGating.from_config(gating.get_config())
    assert again.get_config() == gating.get_config()
