"""The gating layers by themselves; their numbers are tested through SparseMoE."""

import keras
import numpy as np
import pytest
from gradients import with_gradients

from keras_moe import NoisyTopKGating, SoftmaxGating


@pytest.mark.parametrize("gating", [NoisyTopKGating(5, k=2), SoftmaxGating(5)])
def test_routing_has_the_documented_shapes_and_types(gating):
    k = getattr(gating, "k", 5)
    routing = gating(np.ones((3, 4)), training=True)
    found = [(part.shape, keras.backend.standardize_dtype(part.dtype)) for part in routing]
    assert found == [((3, k), "int32"), ((3, k), "float32"), ((5,), "float32"), ((5,), "float32")]


def test_kernels_begin_at_zero():
    gating = NoisyTopKGating(5, k=2)
    gating.build((None, 4))
    for kernel in (gating.gate_kernel, gating.noise_kernel):
        assert kernel.shape == (4, 5)
        assert not np.any(kernel)


@pytest.mark.parametrize("dtype", ["mixed_float16", "bfloat16", "float64"])
def test_gating_is_float32_and_nothing_else(dtype):
    with pytest.raises(ValueError, match=f"float32 whatever .* Received: dtype='{dtype}'"):
        NoisyTopKGating(5, k=2, dtype=dtype)
    routing = NoisyTopKGating(5, k=2)(np.ones((3, 4), "float64"), training=True)
    assert routing.gates.dtype == routing.load.dtype == "float32"


def test_k_of_1_uses_the_probability_among_all_experts():
    gating = NoisyTopKGating(3, k=1)
    gating.build((None, 1))
    gating.gate_kernel.assign(np.log([[1.0, 5.0, 4.0]]))

    def gate(x):
        gates = gating(x).gates
        return gates[0, 0], gates

    gates, _, (gradient,) = with_gradients(gate, [np.ones((1, 1))], [gating.gate_kernel])
    np.testing.assert_allclose(gates, [[0.5]], rtol=1e-6)  # 5 / (1 + 5 + 4)
    # The gradient of softmax's p_1 by its logits: p_1·(1 - p_1) for itself, -p_1·p_j for others.
    np.testing.assert_allclose(gradient, [[-0.05, 0.25, -0.2]], rtol=1e-5)


@pytest.mark.parametrize("k", [2, 5])
def test_no_noise_or_no_choice_means_hard_load(k):
    gating = NoisyTopKGating(5, k=k, noise=k == 5)
    x = np.random.default_rng(0).normal(size=(20, 4))
    gating.build(x.shape)
    gating.gate_kernel.assign(np.random.default_rng(1).normal(size=(4, 5)))
    routing = gating(x, training=True)
    counts = np.bincount(np.ravel(routing.expert_index), minlength=5)
    np.testing.assert_array_equal(routing.load, counts)


@pytest.mark.parametrize("training", [True, False])
def test_masked_examples_have_no_part(training):
    x = np.random.default_rng(0).normal(size=(6, 4))
    mask = np.array([1, 0, 1, 1, 0, 1], bool)
    whole, part = (
        gating(x, training=training, mask=mask)
        for gating, x, mask in (
            (NoisyTopKGating(5, k=2, noise=False), x, mask),
            (NoisyTopKGating(5, k=2, noise=False), x[mask], None),
        )
    )
    np.testing.assert_array_equal(whole.gates[~mask], np.zeros((2, 2)))
    np.testing.assert_allclose(whole.gates[mask], part.gates)
    np.testing.assert_allclose(whole.importance, part.importance)
    np.testing.assert_allclose(whole.load, part.load)


def test_nan_logits_lose_against_all_others():
    gating = NoisyTopKGating(40, k=20)
    gating.build((None, 1))
    kernel = np.linspace(1, 2, 40)
    kernel[::2] = np.nan
    gating.gate_kernel.assign(kernel[None])
    expert_index = gating(np.ones((3, 1))).expert_index
    np.testing.assert_array_equal(np.sort(expert_index), [np.arange(1, 40, 2)] * 3)


def test_inputs_of_another_rank_are_refused():
    with pytest.raises(ValueError, match="expected ndim=2, found ndim=3"):
        NoisyTopKGating(4, k=2)(np.ones((2, 3, 4)))


def test_config_round_trip():
    arguments = {
        "num_experts": 6,
        "k": 3,
        "noise": False,
        "noise_epsilon": 0.1,
        "seed": 4,
        "name": "g",
    }
    gating = NoisyTopKGating(**arguments)
    assert arguments.items() <= gating.get_config().items()
    assert NoisyTopKGating.from_config(gating.get_config()).get_config() == gating.get_config()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 3, "k": 4}, "k=4, num_experts=3"),
        ({"num_experts": 3, "k": 0}, "k=0, num_experts=3"),
        ({"num_experts": 0}, "at least 1. Received: 0"),
        ({"num_experts": 8, "noise_epsilon": 0.0}, "above 0. Received: 0.0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        NoisyTopKGating(**arguments)
