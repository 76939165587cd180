"""The balance measures, by hand."""

import numpy as np
import pytest
from gradients import with_gradients
from keras.ops import convert_to_tensor as tensor

from keras_moe import losses


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        ([1.0, 3.0], 0.25),  # mean 2, variance 1: 1/4
        ([5.0, 5.0, 5.0], 0.0),
        ([0.0, 0.0, 8.0, 0.0], 3.0),  # one of N is not zero: N - 1
        ([7.0], 0.0),
        ([0.0, 0.0], 0.0),
    ],
)
def test_cv_squared(x, expected):
    np.testing.assert_allclose(losses.cv_squared(tensor(x)), expected, rtol=1e-6)


def test_cv_squared_of_zeros_has_a_finite_gradient():
    _, (gradient,), _ = with_gradients(
        lambda x: (losses.cv_squared(x), ()), [np.zeros(3, "float32")], []
    )
    np.testing.assert_array_equal(gradient, np.zeros(3))


def test_max_over_mean():
    np.testing.assert_allclose(losses.max_over_mean(tensor([1.0, 2.0, 6.0])), 2.0, rtol=1e-6)
    np.testing.assert_array_equal(losses.max_over_mean(np.zeros(3)), 0.0)


def test_importance_and_hard_load():
    gates = tensor([[0.75, 0.25], [1.0, 0.0], [np.nan, np.nan]])
    expert_index = tensor([[2, 0], [2, 1], [0, 1]])
    # Expert 2 has 0.75 + 1; the choice with gate 0 is no row; the broken example counts nowhere.
    np.testing.assert_allclose(losses.importance(gates, expert_index, 4), [0.25, 0, 1.75, 0])
    np.testing.assert_array_equal(losses.hard_load(gates, expert_index, 4), [1, 0, 2, 0])


def test_load_asks_for_the_threshold_without_the_expert_itself():
    clean = tensor([[1.0, 0.5, 0.0]])
    noisy = tensor([[1.0, 2.0, 0.0]])
    stddev = tensor([[1.0, 0.5, 2.0]])
    top_logits = tensor([[2.0, 1.0]])  # k = 1 of 3, and one more
    # Expert 1 is in: without it the largest is 1, and z = (0.5 - 1)/0.5 = -1. The others are out
    # and face 2: z = (1 - 2)/1 = -1 and (0 - 2)/2 = -1. Φ(-1) = 0.158655.
    np.testing.assert_allclose(
        losses.load(clean, noisy, stddev, top_logits), [[0.158655] * 3], rtol=1e-5
    )
