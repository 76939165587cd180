"""The oracle's noisy top-k gating and z-loss: values worked out by hand, and definitions."""

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
