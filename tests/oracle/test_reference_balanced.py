"""The oracle's strictly balanced gating (appendix F): values worked out by hand."""

import numpy as np
import pytest
import reference
from numpy.testing import assert_allclose, assert_array_equal
from reference_balanced import batchwise_mask
from test_reference import LN3

# Logits x·(ln 3, 0): G_σ is (3/4, 1/4) for x = 1, (1/2, 1/2) for 0, (1/4, 3/4) for -1. The second
# row is masked. |X| = 3, so that with k = 1 each of two experts keeps m = ceil(3/2) = 2 rows:
# expert 0 the first and the third, expert 1 the fourth and the third. They give 1 and 10.
CASE = {
    "x": [[1.0], [np.nan], [0.0], [-1.0]],
    "kernels": [np.zeros([2, 1, 1])],
    "biases": [[[1.0], [10.0]]],
    "gate_kernel": [[LN3, 0.0]],
    "thresholds": [0.4, 0.8],
    "mask": [True, False, True, True],
    "gating": "strictly_balanced",
    "k": 1,
}


def test_training():
    result = reference.sparse_moe(**CASE)
    # Two places, since the third row has two experts; a tie goes to the lower index.
    assert_array_equal(result.expert_index, [[0, -1], [-1, -1], [0, 1], [1, -1]])
    # Eq 16 makes each row's kept values add up to 1.
    assert_allclose(result.dense_gates, [[1.0, 0.0], [0.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    assert_allclose(result.gates, [[1.0, 0.0], [0.0, 0.0], [0.5, 0.5], [1.0, 0.0]])
    assert_allclose(result.y, [[1.0], [0.0], [5.5], [10.0]])
    assert_array_equal(result.load, [2.0, 2.0])
    assert_allclose(result.importance, [1.5, 1.5])
    assert result.load_loss == 0.0
    # Above the thresholds are expert 0's first and third row. The masks differ, by -1, in what
    # expert 1 keeps: -(1/2 - 0.8) - (3/4 - 0.8) = 0.35, times 1; by each T_1 it grows by 1.
    assert result.batchwise_loss == pytest.approx(0.35)
    assert_allclose(result.gradients["thresholds"], [0.0, 2.0])
    # By G_σ it grows by -1 in those two places. Of a softmax over two, the first logit gets
    # ∓p0·p1 = 1/4 and 3/16 of that and x only is not 0 in the latter: 3/16 · (-1). The gates of the
    # rows with one expert are constant, the third row's importance is balanced.
    assert_allclose(result.gradients["gate_kernel"], [[-3 / 16, 3 / 16]], atol=1e-9)
    assert_allclose(result.gradients["x"].ravel(), [0.0, 0.0, LN3 / 4, 3 / 16 * LN3], atol=1e-9)


def test_inference():
    # The thresholds give expert 0 its first and third row; the last row has no expert.
    result = reference.sparse_moe(**CASE, training=False, upstream=np.ones([4, 1]))
    assert_array_equal(result.expert_index, [[0], [-1], [0], [-1]])
    assert_allclose(result.gates, [[1.0], [0.0], [1.0], [0.0]])
    assert_allclose(result.y, [[1.0], [0.0], [1.0], [0.0]])
    assert_array_equal(result.load, [2.0, 0.0])
    assert result.batchwise_loss == 0.0
    assert_array_equal(result.gradients["thresholds"], [0.0, 0.0])
    # No gate moves: each row's one gate is 1.
    assert_allclose(result.gradients["gate_kernel"], [[0.0, 0.0]], atol=1e-12)


def test_the_loss_weight():
    result = reference.sparse_moe(**CASE, batchwise_loss_weight=0.5, importance_loss_weight=0.0)
    assert result.batchwise_loss == pytest.approx(0.5 * 0.35)
    assert_allclose(result.gradients["thresholds"], [0.0, 1.0])


def test_a_score_on_the_threshold_is_not_above_it():
    # Equal logits: softmax is 1/2 in floating point, too.
    case = {**CASE, "x": np.zeros([1, 1]), "mask": None, "thresholds": [0.5, 0.25]}
    result = reference.sparse_moe(**case, training=False)
    assert_array_equal(result.expert_index, [[1]])
    assert_allclose(result.gates, [[1.0]])


def test_no_expert_at_all():
    case = {**CASE, "thresholds": [1.0, 1.0]}
    result = reference.sparse_moe(**case, training=False)
    assert_array_equal(result.expert_index, [[-1]] * 4)
    assert_array_equal(result.y, np.zeros([4, 1]))
    assert result.loss == result.fraction_dropped == 0.0


def test_ties_go_to_the_lower_row():
    scores = np.full([4, 2], 0.5)
    # Of rows 1 to 3: m = ceil(3/2) = 2, the first two.
    expected = [[False, False], [True, True], [True, True], [False, False]]
    assert_array_equal(batchwise_mask(scores, 1, [1, 2, 3]), expected)


# Of 5 rows and 3 experts: ceil(5/3), ceil(10/3), 5, ceil(2.5); 20/3 is more than there are rows.
@pytest.mark.parametrize(("k", "m"), [(1, 2), (2, 4), (3, 5), (1.5, 3), (4, 5)])
def test_every_expert_keeps_as_many(k, m):
    scores = np.random.default_rng(0).uniform(size=[5, 3])
    mask = batchwise_mask(scores, k, range(5))
    assert_array_equal(mask.sum(axis=0), [m] * 3)
    for i in range(3):  # whatever was kept scores more than what was not
        assert scores[mask[:, i], i].min() > scores[~mask[:, i], i].max(initial=0.0)


def test_capacity_is_of_the_nominal_k():
    # C = ceil(1/2 · 1 · 4 / 2) = 1, where the two places of expert_index would give 2. First
    # choices: expert 0 takes the first row and is full for the third, expert 1 takes the fourth;
    # then it is full for the third, which keeps nothing. Two choices of four.
    result = reference.sparse_moe(**CASE, capacity_factor=0.5)
    assert_allclose(result.y, [[1.0], [0.0], [0.0], [10.0]])
    assert result.fraction_dropped == 0.5
