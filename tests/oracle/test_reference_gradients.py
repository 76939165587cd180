"""The oracle's gradients against finite differences.

They only tell that gradients belong to the forward pass; that the forward pass is the paper's, the
other tests of the oracle tell.
"""

import numpy as np
import pytest
import reference
from finite_differences import TOLERANCE, differences
from numpy.testing import assert_allclose, assert_array_equal
from test_reference import MASK, flat, random_case


def signs(x, kernels, biases, activation):
    """What the relus of all experts see: whether it is positive."""
    result = []
    hidden = x[:, None, None, :]  # [T, 1, 1, D] times [N, D, F]
    for kernel, bias in zip(kernels[:-1], biases[:-1], strict=True):
        z = hidden @ kernel + bias[:, None, :]
        z, value = np.split(z, 2, axis=-1) if activation == "reglu" else (z, 1.0)
        result.append(z > 0.0)
        hidden = np.maximum(z, 0.0) * value
    return result


def branches(case, *, gating=None, mask=None, activation="relu", noise_epsilon=1e-2, **_):
    """The order of the logits (selection, thresholds) and the signs that the relus see."""
    rows = slice(None) if mask is None else np.asarray(mask)
    x = case["x"][rows]
    logits = x @ case["gate_kernel"]
    if gating in (None, "noisy_top_k") and case["normals"] is not None:
        sigma = np.log1p(np.exp(x @ case["noise_kernel"])) + noise_epsilon
        logits = logits + case["normals"][rows] * sigma
    result = [np.argsort(logits)]
    if gating == "strictly_balanced":
        scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        result += [np.argsort(scores, axis=0), scores > case["thresholds"]]
    if activation in ("relu", "reglu"):
        result += signs(x, case["kernels"], case["biases"], activation)
        if "shared_kernels" in case:
            result += signs(x, case["shared_kernels"], case["shared_biases"], activation)
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
        *(
            ({"experts": 3, "hidden": (2, 2), "gated": True}, {"k": 2, "activation": activation})
            for activation in ("glu", "bilinear", "reglu", "geglu", "swiglu")
        ),
        *(
            ({"experts": 3, "hidden": (2, 2)}, {"k": 2, "activation": activation})
            for activation in ("gelu", "silu")
        ),
        ({"experts": 4}, {"k": 2, "capacity_factor": 0.5}),
        ({"experts": 4}, {"k": 1, "capacity_factor": 0.4, "mask": MASK}),
        ({"experts": 3}, {"gating": "softmax", "capacity_factor": 0.4}),
        ({"experts": 3}, {"k": 2, "router_z_loss_weight": 0.9}),
        ({"experts": 3}, {"k": 2, "router_z_loss_weight": 0.9, "mask": MASK}),
        ({"experts": 3}, {"gating": "softmax", "router_z_loss_weight": 0.9}),
        ({"experts": 3, "shared": 2}, {"k": 2}),
        ({"experts": 3, "shared": 2, "gated": True}, {"k": 2, "activation": "swiglu"}),
        ({"experts": 3, "shared": 1}, {"k": 2, "mask": MASK, "capacity_factor": 0.5}),
        *(
            ({"experts": 4}, {"gating": "strictly_balanced", "k": 2, **options})
            for options in (
                {},
                {"training": False},
                {"mask": MASK, "batchwise_loss_weight": 0.6, "router_z_loss_weight": 0.9},
                {"training": False, "mask": MASK, "router_z_loss_weight": 0.9},
                {"capacity_factor": 0.5},
            )
        ),
    ],
    ids=str,
)
def test_gradients_are_those_of_finite_differences(sizes, options):
    case = random_case(**sizes)
    # Weights apart from each other, and large enough for any loss to count against the output.
    weights = {"importance_loss_weight": 0.7, "load_loss_weight": 1.3}
    initial = branches(case, **options)

    def loss():
        for now, before in zip(branches(case, **options), initial, strict=True):
            assert_array_equal(now, before, "the seed puts a step across a kink")
        result = reference.sparse_moe(**case, **options, **weights)
        return (result.y * case["upstream"]).sum() + result.loss

    result = reference.sparse_moe(**case, **options, **weights)
    assert (result.fraction_dropped > 0.0) == ("capacity_factor" in options)
    gradients = result.gradients
    for gradient, array in zip(flat(gradients, gradients), flat(case, gradients), strict=True):
        assert_allclose(gradient, differences(loss, array), **TOLERANCE)
