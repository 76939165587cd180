"""The oracle's experts: activations by hand and by finite differences, gated ones by definition."""

import math

import numpy as np
import pytest
from finite_differences import TOLERANCE, differences
from numpy.testing import assert_allclose
from reference_experts import ACTIVATIONS, GATED_ACTIVATIONS, activate, feed_forward
from test_reference import LN3

PHI = 0.841344746  # Φ(1); Φ(-1) is 1 - Φ(1)


@pytest.mark.parametrize(
    ("activation", "z", "value"),
    [
        ("relu", [2.0, -2.0], [2.0, 0.0]),
        ("gelu", [1.0, 0.0, -1.0], [PHI, 0.0, PHI - 1.0]),
        ("silu", [LN3, 0.0, -LN3], [0.75 * LN3, 0.0, -0.25 * LN3]),  # sigmoid(ln 3) = 3/4
        # The first half, made a gate, times the second half.
        ("glu", [LN3, -LN3, 4.0, 8.0], [0.75 * 4.0, 0.25 * 8.0]),
        ("bilinear", [-2.0, 3.0, 4.0, 8.0], [-8.0, 24.0]),
        ("reglu", [-2.0, 3.0, 4.0, -8.0], [0.0, -24.0]),
        ("geglu", [1.0, -1.0, 4.0, 8.0], [4.0 * PHI, 8.0 * (PHI - 1.0)]),
        ("swiglu", [LN3, -LN3, 4.0, 8.0], [4.0 * 0.75 * LN3, -8.0 * 0.25 * LN3]),
    ],
)
def test_values(activation, z, value):
    assert_allclose(activate(np.array(z), activation)[0], value, atol=1e-8)


@pytest.mark.parametrize("activation", [*ACTIVATIONS, *GATED_ACTIVATIONS])
def test_derivatives(activation):
    # No half has a 0, where relu has its kink.
    z = np.array([-3.0, -0.7, 0.2, 1.1, -1.5, 0.4, 2.0, 0.9])
    hidden, backward = activate(z, activation)
    upstream = np.arange(1.0, 1.0 + len(hidden))
    received = differences(lambda: activate(z, activation)[0] @ upstream, z)
    assert_allclose(backward(upstream), received, **TOLERANCE)


def test_far_from_zero():
    # sigmoid(±1000) is 1 and 0, without a warning of an overflow.
    assert_allclose(activate(np.array([1000.0, -1000.0]), "silu")[0], [1000.0, 0.0], atol=1e-300)
    assert_allclose(ACTIVATIONS["silu"][1](np.array([1000.0, -1000.0])), [1.0, 0.0], atol=1e-300)


def test_a_gated_expert_is_linear_after_its_last_hidden_layer():
    # One unit each. First layer: sigmoid(ln 3 · 1) · (2 · 1 + 6) = 3/4 · 8 = 6. Second layer:
    # sigmoid(0 · 6) · (1 · 6 - 2) = 2. Output: -5 · 2 + 1 = -9; no activation.
    kernels = [np.array([[LN3, 2.0]]), np.array([[0.0, 1.0]]), np.array([[-5.0]])]
    biases = [np.array([0.0, 6.0]), np.array([0.0, -2.0]), np.array([1.0])]
    assert_allclose(feed_forward(np.ones(1), kernels, biases, "glu")[0], [-9.0])


def test_the_gelu_is_exact():
    # The tanh formula is off by 1.5e-4 at 1; the erf's own value: (1 + erf(1/√2)) / 2.
    expected = 0.5 * (1.0 + math.erf(1.0 / math.sqrt(2.0)))
    assert_allclose(activate(np.ones(1), "gelu")[0], [expected], rtol=1e-14)
