"""The oracle itself: values worked out by hand, and definitions."""

import math

import numpy as np
import pytest
import reference
from numpy.testing import assert_allclose, assert_array_equal

LN2, LN3 = math.log(2.0), math.log(3.0)


def test_cv_squared():
    # Mean 2, population variance ((-1)² + 1²) / 2 = 1: CV² = 1/4. With v = variance and m = mean,
    # d(v/m²) = dv/m² - 2v/m³ dm; dv = (x - m), dm = 1/2 for two elements:
    # (-1/4 - 1/8, 1/4 - 1/8) = (-3/8, 1/8). The 1e-10 in the denominator stays below the tolerance.
    value, backward = reference.cv_squared(np.array([1.0, 3.0]))
    assert value == pytest.approx(0.25, abs=1e-9)
    assert_allclose(backward(1.0), [-0.375, 0.125], atol=1e-9)


def test_cv_squared_of_nothing():
    value, backward = reference.cv_squared(np.zeros(3))
    assert value == 0.0
    assert_array_equal(backward(1.0), np.zeros(3))


# Two examples x = 1 and x = 0, two experts, all widths 1, logits x·(ln 3, 0). The softmax gates are
# (3/4, 1/4) and (1/2, 1/2). The experts give 2·relu(x) and relu(4x).
TINY = {
    "x": [[1.0], [0.0]],
    "kernels": [[[[1.0]], [[4.0]]], [[[2.0]], [[1.0]]]],
    "gate_kernel": [[LN3, 0.0]],
    "importance_loss_weight": 1.0,
    "load_loss_weight": 1.0,
    "upstream": [[1.0], [0.0]],
}


def test_two_examples_two_experts_softmax():
    result = reference.sparse_moe(**TINY, gating="softmax")
    assert_allclose(result.dense_gates, [[0.75, 0.25], [0.5, 0.5]])
    assert_array_equal(result.expert_index, [[0, 1], [0, 1]])  # row 1 is a tie
    # y(1) = 3/4 · 2 + 1/4 · 4 = 5/2.
    assert_allclose(result.y, [[2.5], [0.0]])
    # Importance (5/4, 3/4): mean 1, variance 1/16. Each expert sees both rows: load (2, 2), CV 0.
    assert_allclose(result.importance, [1.25, 0.75])
    assert_array_equal(result.load, [2.0, 2.0])
    assert result.importance_loss == pytest.approx(1 / 16, abs=1e-9)
    assert result.load_loss == 0.0

    # d CV² / d importance = (I - m)/m² - v/m³ = (1/4 - 1/16, -1/4 - 1/16) = (3/16, -5/16).
    # Gates of row 0: with the experts' outputs (2 + 3/16, 4 - 5/16), a difference of -3/2. The
    # logits of a softmax over two get ±p0·p1 times that: -3/16 · 3/2 = -9/32. Row 1, upstream 0:
    # the difference is 1/2, p0·p1 = 1/4, hence ±1/8; x = 0 keeps it out of the kernel's gradient.
    # x of row 0: 3/4 · 2 + 1/4 · 4 from the experts, -9/32 · ln 3 from the gates.
    gradients = result.gradients
    assert_allclose(gradients["gate_kernel"], [[-9 / 32, 9 / 32]], atol=1e-9)
    assert_allclose(gradients["x"], [[2.5 - 9 / 32 * LN3], [LN3 / 8]], atol=1e-9)
    # Kernels: gate · other kernel · x, and gate · hidden unit; row 1 has upstream 0.
    assert_allclose(gradients["kernels"][0].ravel(), [0.75 * 2.0, 0.25 * 1.0])
    assert_allclose(gradients["kernels"][1].ravel(), [0.75 * 1.0, 0.25 * 4.0])
    assert_allclose(gradients["biases"][0].ravel(), [0.75 * 2.0, 0.25 * 1.0])
    assert_allclose(gradients["biases"][1].ravel(), [0.75, 0.25])


def test_two_examples_two_experts_top_1():
    # Both rows choose expert 0, row 1 by its lower index; gates 3/4 and 1/2, the full softmax.
    weights = {"importance_loss_weight": 0.2, "load_loss_weight": 0.3}
    result = reference.sparse_moe(**{**TINY, **weights}, k=1)
    assert_array_equal(result.expert_index, [[0], [0]])
    assert_allclose(result.gates, [[0.75], [0.5]])
    assert_allclose(result.y, [[0.75 * 2.0], [0.0]])
    # Importance (5/4, 0) and load (2, 0): standard deviation equals mean, CV² = 1.
    assert_array_equal(result.load, [2.0, 0.0])
    assert result.importance_loss == pytest.approx(0.2, abs=1e-9)
    assert result.load_loss == pytest.approx(0.3, abs=1e-9)
    # CV² of (I, 0) is 1 whatever I, so expert 0 gets no gradient from it: (I - m)/m² - v/m³ with
    # m = I/2 = 5/8 and v = m² is 1/m - 1/m. Its gate gets its output 2: 2 · p0·p1 = 2 · 3/16 = 3/8.
    assert_allclose(result.gradients["gate_kernel"], [[3 / 8, -3 / 8]], atol=1e-8)


def test_noise_and_smooth_load():
    # Zero kernels: σ = softplus(0) + 0.01 = ln 2 + 0.01 and H = (σ, -σ). Each logit is 0, its
    # rival's H is -σ or σ: load = (Φ(1), Φ(-1)). Gate of expert 0: softmax of H = sigmoid(2σ).
    case = {**TINY, "gate_kernel": [[0.0, 0.0]], "normals": [[1.0, -1.0]] * 2}
    result = reference.sparse_moe(**case, k=1, mask=[True, False])
    sigma = LN2 + 0.01
    assert_allclose(result.load, [0.841344746, 0.158655254], atol=1e-9)
    assert_allclose(result.gates[0], 1.0 / (1.0 + math.exp(-2.0 * sigma)))


def test_gates_of_top_2_of_3():
    # Logits (ln 1, ln 3, ln 2): experts 1 and 2, softmax over the two: (3/5, 2/5).
    result = reference.sparse_moe([[1]], np.ones([2, 3, 1, 1]), gate_kernel=[[0, LN3, LN2]], k=2)
    assert_array_equal(result.expert_index, [[1, 2]])
    assert_allclose(result.gates, [[0.6, 0.4]])
    assert_allclose(result.dense_gates, [[0.0, 0.6, 0.4]])
    assert_array_equal(result.load, [0.0, 1.0, 1.0])


MASK = [True, False, True, True, False, True]


def random_bank(rng, experts, sizes, gated):
    """Kernels and biases of `experts` experts whose layers have the sizes [D, F, ..., D_out]."""
    units = [size * (2 if gated else 1) for size in sizes[1:-1]] + [sizes[-1]]
    return (
        [rng.normal(size=[experts, *pair]) for pair in zip(sizes[:-1], units, strict=True)],
        [rng.normal(size=[experts, size]) for size in units],
    )


def random_case(
    *, examples=6, width=3, experts=5, hidden=(4,), output=2, noise=True, gated=False, shared=0
):
    """Arguments of `sparse_moe` with every weight and every upstream gradient random."""
    rng = np.random.default_rng(0)
    sizes = [width, *hidden, output]
    case = {
        "x": rng.normal(size=[examples, width]),
        "gate_kernel": rng.normal(size=[width, experts]),
        "noise_kernel": rng.normal(size=[width, experts]),
    }
    case["kernels"], case["biases"] = random_bank(rng, experts, sizes, gated)
    case["normals"] = rng.normal(size=[examples, experts]) if noise else None
    case["upstream"] = rng.normal(size=[examples, output])
    case["thresholds"] = rng.uniform(0.1, 0.4, size=experts)
    if shared:
        case["shared_kernels"], case["shared_biases"] = random_bank(rng, shared, sizes, gated)
    return case


def flat(arrays, names):
    """The arrays of these names, and of the lists of these names, as one list."""
    return [
        array
        for name in names
        for array in (arrays[name] if isinstance(arrays[name], list) else [arrays[name]])
    ]


@pytest.mark.parametrize("noise", [False, True])
def test_load_counts_rows_when_every_expert_is_chosen(noise):
    result = reference.sparse_moe(**random_case(noise=noise), k=5)
    assert_array_equal(result.load, [6.0] * 5)
    assert result.load_loss == 0.0


@pytest.mark.parametrize(
    ("activation", "experts", "k"), [("relu", 5, 2), ("tanh", 5, 2), ("relu", 1, 1)]
)
def test_a_mixture_of_equal_experts_is_that_expert(activation, experts, k):
    case = random_case(experts=experts, hidden=(4, 3))
    for arrays in (case["kernels"], case["biases"]):
        for array in arrays:
            array[:] = array[0]
    function = {"relu": lambda z: z * (z > 0), "tanh": np.tanh}[activation]
    (first, second, last), (bias_1, bias_2, bias_3) = (
        [array[0] for array in case[name]] for name in ("kernels", "biases")
    )
    hidden = function(function(case["x"] @ first + bias_1) @ second + bias_2)
    # Gates add up to 1, so the mixture changes nothing.
    result = reference.sparse_moe(**case, k=k, activation=activation)
    assert_allclose(result.y, hidden @ last + bias_3, rtol=1e-12)


GATINGS = ["noisy_top_k", "softmax", "strictly_balanced"]


@pytest.mark.parametrize("gating", GATINGS)
def test_masked_rows_are_as_good_as_absent(gating):
    mask = np.array(MASK)
    whole, short = random_case(shared=2), random_case(shared=2)
    whole["x"][~mask] = np.nan  # whatever a padded position holds
    for name in ("x", "normals", "upstream"):
        short[name] = short[name][mask]
    options = {"gating": gating, "k": 2, "router_z_loss_weight": 0.1}
    masked = reference.sparse_moe(**whole, **options, mask=mask)
    absent = reference.sparse_moe(**short, **options)

    for name in ("y", "gates", "dense_gates", "expert_index"):
        assert_array_equal(getattr(masked, name)[mask], getattr(absent, name))
    for name in ("y", "gates", "dense_gates"):
        assert_array_equal(getattr(masked, name)[~mask], 0.0)
    assert_array_equal(masked.expert_index[~mask], -1)
    for name in ("importance", "load", "importance_loss", "load_loss", "router_z_loss"):
        assert_array_equal(getattr(masked, name), getattr(absent, name))
    assert masked.batchwise_loss == pytest.approx(absent.batchwise_loss)

    assert_array_equal(masked.gradients["x"][~mask], 0.0)
    masked.gradients["x"] = masked.gradients["x"][mask]
    names = absent.gradients
    both = flat(masked.gradients, names), flat(absent.gradients, names)
    for with_mask, without in zip(*both, strict=True):
        assert_array_equal(with_mask, without)


@pytest.mark.parametrize("gating", GATINGS)
@pytest.mark.parametrize("mask", [None, [False] * 3])
def test_no_examples(gating, mask):
    case = random_case(examples=0 if mask is None else 3, shared=2)
    options = {"router_z_loss_weight": 1.0, "capacity_factor": 1.0}
    result = reference.sparse_moe(**case, gating=gating, k=2, mask=mask, **options)
    assert_array_equal(result.y, np.zeros(case["upstream"].shape))
    assert result.loss == result.fraction_dropped == 0.0
    for gradient in flat(result.gradients, result.gradients):
        assert_array_equal(gradient, 0.0)


def test_shared_experts():
    # The routed experts give 2·relu(x) and 4·relu(x) with gates (3/4, 1/4); the shared ones 5·x - 1
    # and 7·x + 2 on every row but the masked one, which stays 0 in spite of the biases.
    result = reference.sparse_moe(
        [[1.0], [-1.0], [1.0]],
        [[[[1.0]], [[1.0]]], [[[2.0]], [[4.0]]]],
        gate_kernel=[[LN3, 0.0]],
        gating="softmax",
        mask=[True, True, False],
        shared_kernels=[[[[5.0]], [[7.0]]]],
        shared_biases=[[[-1.0], [2.0]]],
        upstream=[[1.0], [10.0], [100.0]],
        importance_loss_weight=0.0,
    )
    assert_allclose(result.y, [[2.5 + 13.0], [-11.0], [0.0]])
    # upstream · x: 1 · 1 + 10 · (-1) = -9; the biases get 1 + 10.
    assert_allclose(result.gradients["shared_kernels"][0].ravel(), [-9.0, -9.0])
    assert_allclose(result.gradients["shared_biases"][0].ravel(), [11.0, 11.0])


def test_router_z_loss_is_of_the_clean_logits():
    # Row 0 of TINY: logits (ln 3, 0), ln 4; row 1: (0, 0), ln 2. The noise has no part in it.
    result = reference.sparse_moe(**TINY, normals=np.ones([2, 2]), k=1, router_z_loss_weight=0.5)
    expected = 0.5 * (math.log(4.0) ** 2 + LN2**2) / 2
    assert result.router_z_loss == pytest.approx(expected)
