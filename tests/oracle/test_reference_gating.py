"""The oracle's noisy top-k gating and z-loss: values worked out by hand, and definitions."""

import math
import statistics

import numpy as np
import pytest
import reference_gating
from numpy.testing import assert_allclose, assert_array_equal


def test_kth_excluding():
    # k = 1, the largest of the others: of (1, 2) it is 2, of (3, 2) and of (3, 1) it is 3.
    h = np.array([3.0, 1.0, 2.0])
    assert [h[reference_gating.kth_excluding(h, 1, i)] for i in range(3)] == [2.0, 3.0, 3.0]
    # k = 2, the second largest of the same pairs.
    assert [h[reference_gating.kth_excluding(h, 2, i)] for i in range(3)] == [1.0, 2.0, 1.0]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_ties_go_to_the_lowest_index(k):
    kernels = np.zeros([2, 2, 4])
    gating, _ = reference_gating.noisy_top_k(np.ones([3, 2]), *kernels, None, k, None, 1e-2)
    assert_array_equal(gating.expert_index, [list(range(k))] * 3)
    # Equal logits: 1/4 of the full softmax for k = 1, else 1/k.
    assert_allclose(gating.gates[:, :k], 0.25 if k == 1 else 1.0 / k)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_smooth_load_is_the_probability_of_being_chosen_with_own_noise_redrawn(k):
    """Section 4: P(x, i) is over a new draw of the noise on expert i, all other noise kept."""
    rng = np.random.default_rng(0)
    x, gate_kernel, noise_kernel = rng.normal(size=[1, 3]), *rng.normal(size=[2, 3, 5])
    normals = rng.normal(size=[1, 5])

    def gating(normals):
        return reference_gating.noisy_top_k(x, gate_kernel, noise_kernel, normals, k, None, 1e-2)[0]

    # The midpoints of 200 equally likely intervals stand for the draws. Being chosen is monotonic
    # in the draw, so the count is off by half an interval at most.
    draws = [statistics.NormalDist().inv_cdf((j + 0.5) / 200) for j in range(200)]
    for i in range(5):
        chosen = 0
        for draw in draws:
            redrawn = np.where(np.arange(5) == i, draw, normals)
            chosen += i in gating(redrawn).expert_index
        assert gating(normals).load[i] == pytest.approx(chosen / 200, abs=0.5 / 200 + 1e-12)


def test_router_z():
    # Logits x·(ln 3, 0): the sums of their exponentials are 4 for x = 1 and 2 for x = 0.
    x, gate_kernel = np.array([[1.0], [np.nan], [0.0]]), np.array([[math.log(3.0), 0.0]])
    z, backward = reference_gating.router_z(x, gate_kernel, [0, 2])
    assert z == pytest.approx((math.log(4.0) ** 2 + math.log(2.0) ** 2) / 2)
    # Row 0: 1/2 · 2 · ln 4 · softmax (3/4, 1/4); row 2, with ln 2 and (1/2, 1/2), has x = 0.
    d_x, d_gate_kernel = backward(1.0)
    assert_allclose(d_gate_kernel, [[0.75 * math.log(4.0), 0.25 * math.log(4.0)]])
    expected = np.array([0.75 * math.log(4.0), 0.0, 0.5 * math.log(2.0)]) * math.log(3.0)
    assert_allclose(d_x.ravel(), expected)


def test_router_z_of_nothing():
    z, backward = reference_gating.router_z(np.ones([2, 1]), np.ones([1, 3]), [])
    assert z == 0.0
    for gradient in backward(1.0):
        assert_array_equal(gradient, 0.0)
