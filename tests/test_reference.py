"""The oracle itself: values worked out by hand, definitions, and finite differences.

Finite differences only tell that gradients belong to the forward pass; that the forward pass is the
paper's, the other tests tell.
"""

import itertools
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


def random_case(*, examples=6, width=3, experts=5, hidden=(4,), output=2, noise=True):
    """Arguments of `sparse_moe` with every weight and every upstream gradient random."""
    rng = np.random.default_rng(0)
    sizes = [width, *hidden, output]
    return {
        "x": rng.normal(size=[examples, width]),
        "gate_kernel": rng.normal(size=[width, experts]),
        "noise_kernel": rng.normal(size=[width, experts]),
        "kernels": [rng.normal(size=[experts, *pair]) for pair in itertools.pairwise(sizes)],
        "biases": [rng.normal(size=[experts, size]) for size in sizes[1:]],
        "normals": rng.normal(size=[examples, experts]) if noise else None,
        "upstream": rng.normal(size=[examples, output]),
    }


def differentiable(arrays):
    """What has a gradient, of a case or of the dict of gradients, as one flat list."""
    single = [arrays[name] for name in ("x", "gate_kernel", "noise_kernel")]
    return [*single, *arrays["kernels"], *arrays["biases"]]


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


def test_masked_rows_are_as_good_as_absent():
    mask = np.array(MASK)
    whole, short = random_case(), random_case()
    whole["x"][~mask] = np.nan  # whatever a padded position holds
    for name in ("x", "normals", "upstream"):
        short[name] = short[name][mask]
    masked = reference.sparse_moe(**whole, k=2, mask=mask)
    absent = reference.sparse_moe(**short, k=2)

    for name in ("y", "gates", "dense_gates", "expert_index"):
        assert_array_equal(getattr(masked, name)[mask], getattr(absent, name))
    for name in ("y", "gates", "dense_gates"):
        assert_array_equal(getattr(masked, name)[~mask], 0.0)
    assert_array_equal(masked.expert_index[~mask], -1)
    for name in ("importance", "load", "importance_loss", "load_loss"):
        assert_array_equal(getattr(masked, name), getattr(absent, name))

    assert_array_equal(masked.gradients["x"][~mask], 0.0)
    masked.gradients["x"] = masked.gradients["x"][mask]
    both = differentiable(masked.gradients), differentiable(absent.gradients)
    for with_mask, without in zip(*both, strict=True):
        assert_array_equal(with_mask, without)


def test_no_examples():
    result = reference.sparse_moe(**random_case(examples=0), k=2)
    assert result.y.shape == (0, 2)
    assert result.importance_loss == result.load_loss == 0.0
    for gradient in differentiable(result.gradients):
        assert_array_equal(gradient, 0.0)


# Central differences are off by step²/6 times a third derivative and by rounding, about
# 1e-16 · |loss| / step: both about 1e-10 for losses and derivatives of order 1 to 10. The tolerance
# leaves a factor of 100 for larger third derivatives; a wrong term shows in the first digits.
STEP = 1e-5
TOLERANCE = {"rtol": 1e-6, "atol": 1e-8}


def branches(case, *, gating=None, mask=None, activation="relu", noise_epsilon=1e-2, **_):
    """The order of the logits (selection, thresholds) and the signs that the relus see."""
    rows = slice(None) if mask is None else np.asarray(mask)
    x = case["x"][rows]
    logits = x @ case["gate_kernel"]
    if gating != "softmax" and case["normals"] is not None:
        sigma = np.log1p(np.exp(x @ case["noise_kernel"])) + noise_epsilon
        logits = logits + case["normals"][rows] * sigma
    result = [np.argsort(logits)]
    if activation == "relu":
        hidden = x[:, None, None, :]  # [T, 1, 1, D] times [N, D, F]
        for kernel, bias in zip(case["kernels"][:-1], case["biases"][:-1], strict=True):
            hidden = hidden @ kernel + bias[:, None, :]
            result.append(hidden > 0.0)
            hidden = np.maximum(hidden, 0.0)
    return result


def differences(loss, array):
    """Central differences of `loss()` by every entry of `array`, which is moved in place."""
    result = np.zeros_like(array)
    for index in np.ndindex(array.shape):
        value = array[index]
        for sign in (1.0, -1.0):
            array[index] = value + sign * STEP
            result[index] += sign * loss() / (2.0 * STEP)
        array[index] = value
    return result


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({}, {"k": 2}),
        ({}, {"k": 4}),
        ({}, {"k": 1}),
        ({}, {"k": 5}),
        ({"experts": 1}, {"k": 1}),
        ({"noise": False}, {"k": 2}),
        ({"noise": False}, {"k": 1}),
        ({}, {"k": 2, "noise_epsilon": 0.5}),
        ({}, {"k": 2, "mask": MASK}),
        ({}, {"gating": "softmax"}),
        ({}, {"gating": "softmax", "mask": MASK}),
        ({"hidden": (4, 3)}, {"k": 2}),
        ({"hidden": (4, 3)}, {"k": 2, "activation": "tanh"}),
        ({"hidden": ()}, {"k": 2}),
    ],
    ids=str,
)
def test_gradients_are_those_of_finite_differences(sizes, options):
    case = random_case(**sizes)
    # Weights apart from each other, and large enough for either loss to count against the output.
    weights = {"importance_loss_weight": 0.7, "load_loss_weight": 1.3}
    initial = branches(case, **options)

    def loss():
        for now, before in zip(branches(case, **options), initial, strict=True):
            assert_array_equal(now, before, "the seed puts a step across a kink")
        result = reference.sparse_moe(**case, **options, **weights)
        return (result.y * case["upstream"]).sum() + result.importance_loss + result.load_loss

    gradients = reference.sparse_moe(**case, **options, **weights).gradients
    for gradient, array in zip(differentiable(gradients), differentiable(case), strict=True):
        assert_allclose(gradient, differences(loss, array), **TOLERANCE)
