"""The oracle's capacity: who is admitted, worked out by hand."""

import numpy as np
import pytest
import reference
from numpy.testing import assert_allclose, assert_array_equal
from reference_capacity import admit, capacity
from reference_hierarchical import hierarchical_moe
from test_reference import LN3, TINY


@pytest.mark.parametrize(
    ("factor", "choices", "examples", "experts", "expected"),
    [
        (1.0, 2, 8, 4, 4),  # a fair share exactly
        (1.25, 2, 8, 4, 5),
        (1.0, 2, 7, 4, 4),  # 3.5, rounded up
        (0.01, 1, 8, 4, 1),
        (100.0, 2, 8, 4, 8),  # no expert gets a row twice
        (None, 2, 8, 4, 8),
        (1.0, 2, 0, 4, 0),
    ],
)
def test_capacity(factor, choices, examples, experts, expected):
    assert capacity(factor, choices, examples, experts) == expected


def test_first_choices_come_before_second_choices():
    # One place each: row 0's second choice is expert 1, but row 1's first choice takes it, and the
    # other way round. Four choices, two of them dropped.
    gates = np.full([2, 2], 0.5)
    admitted, fraction = admit(np.array([[0, 1], [1, 0]]), gates, 1)
    assert_array_equal(admitted, np.eye(2, dtype=bool))
    assert fraction == 0.5
    # Of equals the lower row comes first.
    admitted, fraction = admit(np.array([[0, 1], [0, 1]]), gates, 1)
    assert_array_equal(admitted, [[True, True], [False, False]])
    assert fraction == 0.5


def test_no_place_for_masked_rows_and_gates_of_0():
    # Row 0 is masked. Row 1 has one expert of two places, expert 1; if -1 took a place of that, its
    # two places would be gone before row 2's second choice.
    expert_index = np.array([[-1, -1], [1, -1], [0, 1], [0, -1]])
    gates = np.array([[0.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    admitted, fraction = admit(expert_index, gates, 2)
    assert_array_equal(admitted, gates > 0.0)
    assert fraction == 0.0
    # With one place each row 3 gets expert 0, since row 2's gate for it is 0, and row 2's second
    # choice is dropped: one choice of three.
    admitted, fraction = admit(expert_index, gates, 1)
    assert_array_equal(admitted, [[False] * 2, [False, True], [False] * 2, [True, False]])
    assert fraction == pytest.approx(1 / 3)


def test_nothing_to_drop():
    admitted, fraction = admit(np.full([2, 1], -1), np.zeros([2, 3]), 0)
    assert not admitted.any()
    assert fraction == 0.0


def test_a_dropped_choice_adds_nothing_and_changes_nothing_else():
    # See TINY: gates (3/4, 1/4) for x = 1, (9/10, 1/10) for x = 2; outputs (2, 4) and (4, 8). With
    # C = ceil(1/2 · 2 · 2 / 2) = 1 row 0 takes both experts' only places.
    case = {**TINY, "x": [[1.0], [2.0]], "upstream": [[1.0], [1.0]], "gating": "softmax"}
    whole, dropped = reference.sparse_moe(**case), reference.sparse_moe(**case, capacity_factor=0.5)
    assert dropped.fraction_dropped == 0.5
    assert whole.fraction_dropped == 0.0
    assert_allclose(whole.y, [[2.5], [4.4]])
    assert_allclose(dropped.y, [[2.5], [0.0]])
    for name in ("gates", "dense_gates", "importance", "load", "importance_loss", "load_loss"):
        assert_array_equal(getattr(dropped, name), getattr(whole, name))
    # Without losses nothing reaches row 1, and the kernels get what row 0 gives them.
    weights = {"importance_loss_weight": 0.0, "load_loss_weight": 0.0}
    gradients = reference.sparse_moe(**{**case, **weights}, capacity_factor=0.5).gradients
    assert_array_equal(gradients["x"][1], 0.0)
    assert_allclose(gradients["kernels"][1].ravel(), [0.75 * 1.0, 0.25 * 4.0])


def test_half_of_an_example_may_be_dropped_without_renormalisation():
    # x = 1 twice, top-2 of 3 with logits (ln 3, 0, -1): both rows have gates (3/4, 1/4, 0), experts
    # that give 1, 10 and 100. c = 3/4: C = ceil(3/4 · 2 · 3 / 3) = 2, so that the third row, whose
    # logits (0, -1, ln 3) choose 2 and 0, keeps expert 2 alone, expert 0 being full: 3/4 · 100.
    result = reference.sparse_moe(
        [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]],
        [np.array([1.0, 10.0, 100.0])[:, None, None] * np.ones([3, 2, 1])],
        gate_kernel=[[LN3, 0.0, -1.0], [0.0, -1.0, LN3]],
        k=2,
        capacity_factor=0.75,
    )
    assert_array_equal(result.expert_index, [[0, 1], [0, 1], [2, 0]])
    assert_allclose(result.y, [[0.75 + 2.5], [0.75 + 2.5], [75.0]])
    assert result.fraction_dropped == pytest.approx(1 / 6)


def test_masked_rows_count_for_the_capacity_and_take_none():
    # Every row chooses expert 0 of 2. Of four rows C = ceil(1 · 1 · 4 / 2) = 2: enough for the two
    # last ones, which it would not be if the masked rows took places (0 left) or did not count (1).
    result = reference.sparse_moe(
        np.ones([4, 1]),
        [np.ones([2, 1, 1])],
        gate_kernel=[[LN3, 0.0]],
        k=1,
        mask=[False, False, True, True],
        capacity_factor=1.0,
    )
    assert_allclose(result.y, [[0.0], [0.0], [0.75], [0.75]])
    assert result.fraction_dropped == 0.0


def test_the_order_of_a_hierarchical_example_is_group_by_group():
    # Row 0: groups (2/5, 3/5), within them (9/10, 1/10) and (1/2, 1/2), so its order is 2, 3, 0, 1
    # although its largest gate is 9/25, of expert 0. Row 1: groups (3/4, 1/4), within them
    # (1/4, 3/4) and (1/2, 1/2): 1, 0, 2, 3. C = ceil(1/2 · 4 · 2 / 4) = 1. First choices 2 and 1,
    # second choices 3 and 0, then nothing is left: expert 0 goes to row 1.
    result = hierarchical_moe(
        np.eye(2),
        [np.array([1.0, 2.0, 3.0, 4.0])[:, None, None] * np.ones([4, 2, 1])],
        primary=np.log([[2.0, 3.0], [3.0, 1.0]]),
        secondary=np.log([[[9.0, 1.0], [1.0, 3.0]], np.ones([2, 2])]),
        k=(2, 2),
        capacity_factor=0.5,
    )
    assert_array_equal(result.expert_index, [[2, 3, 0, 1], [1, 0, 2, 3]])
    # 3/10 · (3 + 4), and 9/16 · 2 + 3/16 · 1.
    assert_allclose(result.y, [[2.1], [21 / 16]])
    assert result.fraction_dropped == 0.5
    assert_array_equal(result.load, np.full([2, 2], 2.0))
