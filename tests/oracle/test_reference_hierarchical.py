"""The hierarchical oracle itself: values worked out by hand, and finite differences."""

import math

import numpy as np
import pytest
from finite_differences import TOLERANCE, differences
from numpy.testing import assert_allclose, assert_array_equal
from reference_hierarchical import hierarchical_moe
from test_reference import LN2, LN3, MASK, flat, random_bank

PHI, PHI_MINUS = 0.841344746, 0.158655254  # Φ(1) and Φ(-1)


def test_gates_are_products():
    # Group logits (0, ln 3): gates 1/4 and 3/4, group 1 first. Within the groups (ln 3, 0) and
    # (0, 0): (3/4, 1/4) and, a tie, (1/2, 1/2). Expert n multiplies by n + 1.
    result = hierarchical_moe(
        [[1.0]],
        [np.reshape([1.0, 2.0, 3.0, 4.0], [4, 1, 1])],
        primary=[[0.0, LN3]],
        secondary=[[[LN3, 0.0]], [[0.0, 0.0]]],
        k=(2, 2),
    )
    assert_array_equal(result.expert_index, [[2, 3, 0, 1]])
    assert_allclose(result.gates, [[3 / 8, 3 / 8, 3 / 16, 1 / 16]])
    assert_allclose(result.importance, [[3 / 16, 1 / 16], [3 / 8, 3 / 8]])
    assert_array_equal(result.load, [[1.0, 1.0], [1.0, 1.0]])
    # (3·1 + 1·2 + 6·3 + 6·4) / 16 = 47/16.
    assert_allclose(result.y, [[47 / 16]])


def test_load_of_both_levels():
    # Zero kernels and k = 1 of 2: an example whose normals are (1, -1) has chances (Φ(1), Φ(-1)),
    # see test_reference.py. Two examples go to group 0, one to group 1.
    result = hierarchical_moe(
        np.ones([3, 1]),
        [np.ones([4, 1, 1])],
        primary=np.zeros([1, 2]),
        secondary=np.zeros([2, 1, 2]),
        normals=([[1, -1], [1, -1], [-1, 1]], [[[1, -1]], [[-1, 1]], [[1, -1]]]),
        k=(1, 1),
    )
    assert_array_equal(result.expert_index, [[0], [1], [2]])
    # Load_primary, and within the groups Load_i / |X^(i)|: (Φ(1) + Φ(-1)) / 2 = 1/2 for both
    # experts of group 0; the chances of the one example for those of group 1.
    group_0, group_1 = 2 * PHI + PHI_MINUS, PHI + 2 * PHI_MINUS
    expected = [[group_0 / 2, group_0 / 2], [group_1 * PHI, group_1 * PHI_MINUS]]
    assert_allclose(result.load, expected, atol=1e-8)
    # A gate is the product of both full softmaxes: sigmoid(2σ) each.
    sigma = LN2 + 0.01
    assert_allclose(result.gates, np.full([3, 1], 1 / (1 + math.exp(-2 * sigma)) ** 2))


def random_case(
    *, examples=6, width=2, groups=3, group_size=3, k=(2, 2), noise=True, gated=False, shared=0
):
    """Arguments of `hierarchical_moe` with every weight and upstream gradient random."""
    rng = np.random.default_rng(0)
    sizes = [width, 2, 2]
    normals = rng.normal(size=[examples, groups]), rng.normal(size=[examples, k[0], group_size])
    case = {
        "x": rng.normal(size=[examples, width]),
        "primary": rng.normal(size=[width, groups]),
        "primary_noise": rng.normal(size=[width, groups]),
        "secondary": rng.normal(size=[groups, width, group_size]),
        "secondary_noise": rng.normal(size=[groups, width, group_size]),
        "normals": normals if noise else None,
        "k": k,
    }
    case["kernels"], case["biases"] = random_bank(rng, groups * group_size, sizes, gated)
    case["upstream"] = rng.normal(size=[examples, sizes[-1]])
    if shared:
        case["shared_kernels"], case["shared_biases"] = random_bank(rng, shared, sizes, gated)
    return case


def test_masked_rows_reach_nothing():
    case = random_case()
    case["x"][~np.array(MASK)] = np.nan  # whatever a padded position holds
    result = hierarchical_moe(**case, mask=MASK)
    assert np.isfinite(result.load).all()
    for array in (result.y, result.dense_gates, result.gradients["x"]):
        assert_array_equal(array[~np.array(MASK)], 0.0)
    assert_array_equal(result.expert_index[~np.array(MASK)], -1)


def test_router_z_loss_of_both_levels():
    # Rows 0, 1 and 3 have x = 1, 1 and -1; row 2 is masked. Primary logits x·(0, ln 3): group 1 for
    # x = 1, with ln(1 + 3) = ln 4, and group 0 for x = -1, with ln(1 + 1/3) = ln 4/3. Secondary
    # logits x·(ln 3, 0) and x·(0, 0): ln 2 twice in group 1 and ln 4/3 in group 0, a mean over
    # three pairs (and not over two groups). The noise has no part in it: with it, too, each row
    # keeps its group.
    ln4, ln4_3 = math.log(4.0), math.log(4.0 / 3.0)
    case = {
        "x": [[1.0], [1.0], [np.nan], [-1.0]],
        "kernels": [np.ones([4, 1, 1])],
        "primary": [[0.0, LN3]],
        "secondary": [[[LN3, 0.0]], [[0.0, 0.0]]],
        "normals": (np.zeros([4, 2]) + 0.1, np.ones([4, 1, 2])),
        "mask": [True, True, False, True],
        "k": (1, 1),
    }
    result = hierarchical_moe(**case, router_z_loss_weight=0.5)
    expected = (2 * ln4**2 + ln4_3**2) / 3 + (2 * LN2**2 + ln4_3**2) / 3
    assert result.router_z_loss == pytest.approx(0.5 * expected)
    assert hierarchical_moe(**case).router_z_loss == 0.0
    nothing = hierarchical_moe(**{**case, "mask": [False] * 4}, router_z_loss_weight=0.5)
    assert nothing.loss == 0.0


def test_shared_experts():
    # One group of one expert, x; the shared one adds 2·x + 1, but to the masked row.
    result = hierarchical_moe(
        [[1.0], [3.0], [5.0]],
        [np.ones([1, 1, 1])],
        primary=[[0.0]],
        secondary=[[[0.0]]],
        k=(1, 1),
        mask=[True, True, False],
        shared_kernels=[[[[2.0]]]],
        shared_biases=[[[1.0]]],
    )
    assert_allclose(result.y, [[4.0], [10.0], [0.0]])


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({}, {}),
        ({}, {"mask": MASK}),
        ({"noise": False}, {}),
        ({"k": (1, 1)}, {}),
        ({"k": (1, 1), "noise": False}, {}),
        ({"k": (3, 2)}, {}),
        ({"k": (2, 3)}, {}),
        ({"k": (3, 3)}, {"mask": MASK}),
        ({"k": (1, 2), "groups": 1}, {}),
        ({"k": (2, 1), "group_size": 1}, {}),
        (
            {"k": (1, 2), "groups": 9},
            {"router_z_loss_weight": 0.9},
        ),  # more groups than examples: some are empty
        ({}, {"capacity_factor": 0.5}),
        ({"k": (2, 1)}, {"capacity_factor": 0.5, "mask": MASK}),
        ({}, {"router_z_loss_weight": 0.9}),
        ({"noise": False, "k": (1, 1)}, {"router_z_loss_weight": 0.9, "mask": MASK}),
        ({"groups": 2, "group_size": 2, "shared": 2}, {"mask": MASK}),
        ({"groups": 2, "group_size": 2, "gated": True}, {"activation": "swiglu"}),
    ],
    ids=str,
)
def test_gradients_are_those_of_finite_differences(sizes, options):
    case = random_case(**sizes)
    # Weights apart from each other, and large enough for any loss to count against the output.
    weights = {"importance_loss_weight": 0.7, "load_loss_weight": 1.3}
    options = {"activation": "tanh", **weights, **options}
    initial = hierarchical_moe(**case, **options)
    assert (initial.fraction_dropped > 0.0) == ("capacity_factor" in options)

    def loss():
        result = hierarchical_moe(**case, **options)
        assert_array_equal(result.expert_index, initial.expert_index, "a step across a kink")
        return (result.y * case["upstream"]).sum() + result.loss

    gradients = initial.gradients
    for gradient, array in zip(flat(gradients, gradients), flat(case, gradients), strict=True):
        assert_allclose(gradient, differences(loss, array), **TOLERANCE)
