"""Whatever the arguments allow, drawn at random: nothing breaks a layer, and no rule is broken.

Derandomized, so that every run draws the same. To search further, raise `max_examples` and take
`derandomize` out.
"""

import contextlib
import dataclasses
from unittest import mock

import hypothesis
import keras
import numpy as np
import pytest
import reference
from combinations import draws
from helpers import assign_random_weights, call_gradients_and_routing
from hypothesis import strategies as st
from inputs import policies
from keras.ops import convert_to_numpy as numpy
from reference_hierarchical import hierarchical_moe

from keras_moe import (
    FeedForwardExperts,
    HierarchicalGating,
    HierarchicalMoE,
    LayerExperts,
    NoisyTopKGating,
    SparseMoE,
    StrictlyBalancedGating,
)

POLICIES = policies("float32", "mixed_float16", "mixed_bfloat16", "float64", "bfloat16")
# Of 6·10⁴ float16 holds little more, and float32 no fourth power of 10¹⁰.
BROKEN = {"huge": 6e4, "enormous": 1e10, "nan": np.nan, "inf": np.inf, "-inf": -np.inf}


def settings(max_examples):
    return hypothesis.settings(
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )


@dataclasses.dataclass
class Case:
    """Arguments of a layer and of its call; `sound` [T] tells which examples are ordinary."""

    kind: str
    arguments: dict
    bank: str
    policy: str
    x: np.ndarray
    mask: np.ndarray | None
    sound: np.ndarray
    values: str
    seed: int


@st.composite
def sizes(draw):
    """The kind of gating, the number of experts, and K."""
    kind = draw(st.sampled_from(["noisy_top_k", "softmax", "strictly_balanced", "hierarchical"]))
    if kind == "hierarchical":
        groups, members = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        k = draw(st.integers(1, groups)), draw(st.integers(1, members))
        return kind, {"num_groups": groups, "experts_per_group": members, "k": k}
    number = draw(st.integers(1, 6))
    return kind, {"num_experts": number, "k": draw(st.integers(1, number)), "gating": kind}


@st.composite
def banks(draw):
    """The kind of bank, and what describes it: hidden units, or arguments of a bank to make."""
    bank = draw(st.sampled_from(["default", "default", "static", "dense", "sequential"]))
    if bank in ("dense", "sequential"):
        return bank, {}
    gated = ["swiglu", "geglu", "reglu", "glu", "bilinear"]
    return bank, {
        "hidden_units": draw(st.sampled_from([1, 3, [2, 3]])),
        "activation": draw(st.sampled_from(["relu", "tanh", "gelu", *gated])),
        "output_dim": draw(st.sampled_from([None, 2])),
        "use_bias": draw(st.booleans()),
        "recompute": draw(st.booleans()),
    }


@st.composite
def inputs(draw):
    """[..., D] with some broken examples, a mask, and which examples are not broken."""
    leading = draw(st.lists(st.sampled_from([3, 2, 4, 1, 5, 3, 2, 0]), min_size=1, max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    width, number = draw(st.integers(1, 4)), int(np.prod(leading))
    values = draw(st.sampled_from(["normal", "equal", "zero", *BROKEN]))
    x, sound = rng.normal(size=(number, width)), np.ones(number, bool)
    if values == "equal":
        x = np.tile(rng.normal(size=(1, width)), (number, 1))
    elif values == "zero":
        x = np.zeros_like(x)
    elif values in BROKEN:
        sound = rng.random(number) < 0.6
        x[~sound] *= 0.1
        x[~sound, 0] = BROKEN[values]
    mask = rng.random(leading) < 0.7 if draw(st.booleans()) else None
    return x.reshape(*leading, width), mask, sound, values


@st.composite
def cases(draw):
    kind, arguments = draw(sizes())
    bank, description = draw(banks())
    x, mask, sound, values = draw(inputs())
    options = {
        "capacity_factor": draw(st.sampled_from([None, None, 0.3, 1.0, 4])),
        "num_shared_experts": draw(st.integers(0, 2)),
        "router_z_loss_weight": draw(st.sampled_from([0.0, 0.1])),
    }
    policy, seed = draw(st.sampled_from(POLICIES)), draw(st.integers(0, 2**31))
    arguments = {**arguments, **options, **description, "dtype": policy, "seed": seed}
    return Case(kind, arguments, bank, policy, x, mask, sound, values, seed)


def layer_of(case):
    arguments = dict(case.arguments)
    cls = HierarchicalMoE if case.kind == "hierarchical" else SparseMoE
    if case.bank == "dense":
        arguments["experts"] = keras.layers.Dense(2, "tanh")
    elif case.bank == "sequential":
        layers = [keras.layers.Dense(3, "relu"), keras.layers.Dense(2, dtype=case.policy)]
        arguments["experts"] = keras.Sequential(layers)
    elif case.bank == "static":
        number = np.prod([v for k, v in arguments.items() if k.startswith(("num_g", "num_e", "e"))])
        names = ("hidden_units", "activation", "output_dim", "use_bias", "recompute")
        described = {name: arguments.pop(name) for name in names}
        arguments["experts"] = FeedForwardExperts(
            int(number), **described, static_shapes=True, dtype=case.policy
        )
    layer = cls(**arguments)
    layer.build(case.x.shape)
    assign_random_weights(layer, np.random.default_rng(case.seed))
    return layer


def check_routing(case, layer, routing, counted):
    index, gates = numpy(routing.expert_index), numpy(routing.gates)
    assert index.shape == gates.shape and index.shape[0] == len(counted)
    assert np.all(index >= 0) and np.all(index < layer.num_experts)
    np.testing.assert_array_equal(gates[~counted], np.zeros_like(gates[~counted]))
    regular = gates[case.sound & counted]
    sums = regular.sum(axis=1)
    assert np.all(regular >= 0) and np.all(sums <= 1 + 1e-5)
    if case.kind == "strictly_balanced":
        assert np.all((sums == 0) | (sums > 1 - 1e-5))
    elif case.kind == "softmax" or np.min(layer.k) > 1:
        assert np.all(sums > 1 - 1e-5)
    importance, load = numpy(routing.importance), numpy(routing.load)
    alive = np.where(np.isfinite(gates), gates, 0.0)
    np.testing.assert_allclose(importance.sum(), alive.sum(), rtol=1e-4, atol=1e-5)
    assert np.all(load >= 0) and np.all(load <= counted.sum() * (1 + 1e-5))
    return alive, load


def check_gradients(layer, gradients):
    for weight, gradient in zip(["x", *layer.trainable_weights], gradients, strict=True):
        name = getattr(weight, "path", weight)
        assert np.isfinite(np.float32(gradient)).all(), f"gradient of {name}"


def oracle(case, layer, x, mask, *, training):
    """The outputs of the same layer in NumPy; `None` where they would depend on the noise."""
    noisy = case.kind in ("noisy_top_k", "hierarchical")
    # Which of equal examples an expert keeps, rounding may decide.
    tied = case.kind == "strictly_balanced" and case.values in ("equal", "zero")
    if not isinstance(layer.experts, FeedForwardExperts) or training and (noisy or tied):
        return None
    gating, shared = layer.gating, layer.shared_experts
    options = {
        "k": layer.k,
        "mask": mask,
        "activation": case.arguments["activation"],
        "capacity_factor": layer.capacity_factor if training else None,
    }
    if shared is not None:
        options["shared_kernels"] = [numpy(kernel) for kernel in shared.kernels]
        options["shared_biases"] = [numpy(bias) for bias in shared.biases] or None
    bank = [numpy(v) for v in layer.experts.kernels], [numpy(v) for v in layer.experts.biases]
    if case.kind == "hierarchical":
        kernels = {name: numpy(getattr(gating, name)) for name in ("primary", "secondary")}
        return hierarchical_moe(x, bank[0], bank[1] or None, **kernels, **options).y
    if case.kind == "strictly_balanced":
        options |= {"thresholds": numpy(gating.thresholds), "training": training}
    options |= {"gate_kernel": numpy(gating.gate_kernel), "gating": case.kind}
    return reference.sparse_moe(x, bank[0], bank[1] or None, **options).y


def counting_as(even):
    """Inside, the load of experts is taken for even, or not: with so few rows it always would be.

    Under TensorFlow, where that decides the way; under JAX there is one.
    """
    if keras.config.backend() == "jax":
        return contextlib.nullcontext()
    import tensorflow as tf

    from keras_moe.backend.tensorflow import loops

    return mock.patch.object(loops, "is_even", lambda _: tf.constant(even))


@settings(draws(120, in_jax=12))
@hypothesis.given(case=cases(), training=st.booleans(), even=st.booleans())
def test_nothing_that_the_arguments_allow_breaks_a_layer(case, training, even):
    layer = layer_of(case)
    with np.errstate(over="ignore", invalid="ignore"):  # What is enormous is infinite in float16.
        x = case.x.astype(layer.compute_dtype)
    mask = None if case.mask is None else case.mask.reshape(-1)
    counted = np.ones(len(case.sound), bool) if mask is None else mask
    with counting_as(even):
        y, losses, gradients, routing = call_gradients_and_routing(
            layer, x, training=training, mask=case.mask
        )

    assert y.shape == layer.compute_output_shape(case.x.shape)
    assert keras.backend.standardize_dtype(y.dtype) == layer.compute_dtype
    flat = np.float64(y).reshape(-1, y.shape[-1])
    assert np.isfinite(flat[case.sound]).all()
    np.testing.assert_array_equal(flat[~counted], np.zeros_like(flat[~counted]))

    alive, load = check_routing(case, layer, routing, counted)
    if not training:  # A count.
        np.testing.assert_array_equal(load.sum(), np.count_nonzero(alive))
    losses = np.float64(losses)
    assert np.isfinite(losses).all() and np.all(losses >= 0)

    if np.all(case.sound | ~counted):
        check_gradients(layer, gradients)
        flat_x = np.float64(x).reshape(-1, x.shape[-1])
        if case.policy in ("float32", "float64"):
            expected = oracle(case, layer, np.nan_to_num(flat_x), mask, training=training)
            if expected is not None:
                np.testing.assert_allclose(flat, expected, rtol=1e-3, atol=1e-4)


no_size = st.one_of(st.integers(max_value=0), st.floats(), st.text(), st.booleans())
no_weight = st.one_of(
    st.floats(max_value=0, exclude_max=True),
    st.sampled_from([np.inf, np.nan, None, 1j]),
    st.text(),
    st.booleans(),
)
no_layer = st.one_of(st.integers(), st.text(), st.just(keras.layers.Dense), st.booleans())
not_k = st.one_of(no_size, st.integers(min_value=6), st.none())
REFUSED = {
    SparseMoE: {
        "num_experts": st.one_of(no_size, st.none()),
        "hidden_units": st.one_of(no_size, st.none(), st.lists(no_size, max_size=2)),
        "k": not_k,
        "output_dim": no_size,
        "gating": st.one_of(no_layer, st.none()),
        "experts": no_layer,
        "num_shared_experts": st.one_of(st.integers(max_value=-1), st.floats(), st.none()),
        "capacity_factor": st.one_of(no_weight.filter(lambda value: value is not None), st.just(0)),
        "importance_loss_weight": no_weight,
        "load_loss_weight": no_weight,
        "router_z_loss_weight": no_weight,
        "seed": st.one_of(st.floats(), st.text()),
    },
    HierarchicalMoE: {
        "num_groups": st.one_of(no_size, st.none()),
        "experts_per_group": st.one_of(no_size, st.none()),
        "k": st.one_of(
            no_size, st.none(), st.lists(no_size), st.tuples(not_k, not_k), st.tuples(st.just(1))
        ),
        "gating": st.one_of(no_layer, st.just("softmax")),
    },
    NoisyTopKGating: {
        "num_experts": no_size,
        "k": not_k,
        "noise_epsilon": st.one_of(no_weight, st.just(0)),
    },
    StrictlyBalancedGating: {"k": not_k, "batchwise_loss_weight": no_weight},
    HierarchicalGating: {"num_groups": no_size, "k": st.tuples(not_k, not_k)},
    LayerExperts: {"num_experts": no_size, "layer": no_layer},
}
ACCEPTED = {
    SparseMoE: {"num_experts": 5, "hidden_units": 4, "k": 2},
    HierarchicalMoE: {"num_groups": 5, "experts_per_group": 5, "hidden_units": 4},
    NoisyTopKGating: {"num_experts": 5, "k": 2},
    StrictlyBalancedGating: {"num_experts": 5, "k": 2},
    HierarchicalGating: {"num_groups": 5, "experts_per_group": 5},
    LayerExperts: {"num_experts": 5, "layer": keras.layers.Dense(2)},
}


@settings(300)
@hypothesis.given(data=st.data())
def test_what_the_arguments_do_not_allow_is_refused(data):
    cls = data.draw(st.sampled_from(list(REFUSED)))
    name = data.draw(st.sampled_from(list(REFUSED[cls])))
    arguments = {**ACCEPTED[cls], name: data.draw(REFUSED[cls][name])}
    with pytest.raises(ValueError, match="Received"):
        cls(**arguments)
