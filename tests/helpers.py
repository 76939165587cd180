"""What several test files share: weights, comparison with the oracle, a small model, its data."""

import contextlib
import socket

import keras
import numpy as np
import pytest
import reference
from gradients import value_and_gradients, with_gradients  # noqa: F401
from keras import ops
from keras.ops import convert_to_numpy as numpy
from reference_hierarchical import hierarchical_moe

from keras_moe import (
    HierarchicalBalancedGating,
    HierarchicalGating,
    HierarchicalMoE,
    NoisyTopKGating,
    SoftmaxGating,
    SparseMoE,
    StrictlyBalancedGating,
)

WIDTH, EXAMPLES = 6, 24
GATINGS = {
    NoisyTopKGating: "noisy_top_k",
    SoftmaxGating: "softmax",
    StrictlyBalancedGating: "strictly_balanced",
}
# Weights that may be without a gradient outside training: noise is not drawn, and a threshold cuts.
IDLE_AT_INFERENCE = {
    "noise_kernel",
    "primary_noise",
    "secondary_noise",
    "thresholds",
    "primary_thresholds",
    "secondary_thresholds",
}


@contextlib.contextmanager
def network_cut():
    """Inside, whatever turns to the network fails."""

    def cut(*args, **kwargs):
        raise AssertionError(f"the network was used: {args}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", cut)
        patch.setattr(socket, "getaddrinfo", cut)
        yield


def examples(number=EXAMPLES, seed=0):
    return np.random.default_rng(seed).normal(size=(number, WIDTH)).astype("float32")


def assign_random_weights(layer, rng, scale=1.0):
    """Weights far from zero: initial gating kernels are zeros, which would test ties alone."""
    assert layer.built
    for weight in layer.weights:
        weight.assign(scale * rng.normal(size=weight.shape))


def with_random_weights(layer, width=WIDTH, seed=0, scale=1.0):
    layer.build((None, width))
    assign_random_weights(layer, np.random.default_rng(seed), scale)
    return layer


def spoil_other_experts(layer, x):
    """Fills the kernels of all experts that `x` is not sent to with NaN."""
    chosen = np.unique(layer.route(x).expert_index)
    for kernel in layer.experts.kernels:
        spoilt = np.full(kernel.shape, np.nan, "float32")
        spoilt[chosen] = numpy(kernel)[chosen]
        kernel.assign(spoilt)


def random_hierarchical(*args, **kwargs):
    return with_random_weights(HierarchicalMoE(*args, **kwargs))


def oracle(layer, x, *, training, upstream=None, mask=None):
    """The oracle's answer for the layer's weights and the first noise that it will draw."""
    gating, experts, shared = layer.gating, layer.experts, layer.shared_experts
    arguments = {
        **{weight.name: numpy(weight) for weight in gating.trainable_weights},
        "k": gating.k,
        "mask": mask,
        "activation": experts.get_config()["activation"],
        "capacity_factor": layer.capacity_factor if training else None,
        "importance_loss_weight": layer.importance_loss_weight,
        "load_loss_weight": layer.load_loss_weight,
        "router_z_loss_weight": gating.router_z_loss_weight,
        "batchwise_loss_weight": getattr(gating, "batchwise_loss_weight", 0.0),
        "upstream": upstream,
    }
    if shared is not None:
        arguments["shared_kernels"] = [numpy(kernel) for kernel in shared.kernels]
        arguments["shared_biases"] = [numpy(bias) for bias in shared.biases] or None
    balanced = isinstance(gating, HierarchicalBalancedGating)
    hierarchical = isinstance(gating, HierarchicalGating) or balanced
    if training and getattr(gating, "noise", False):
        generator = keras.random.SeedGenerator(gating.seed)
        shapes = [(len(x), gating.num_groups if hierarchical else gating.num_experts)]
        if hierarchical:
            shapes.append((len(x), gating.k[0], gating.experts_per_group))
        normals = [numpy(keras.random.normal(shape, seed=generator)) for shape in shapes]
        arguments["normals"] = normals if hierarchical else normals[0]
    if hierarchical:
        function = hierarchical_moe
        arguments |= {"balanced_in_training": training} if balanced else {}
    else:
        function = reference.sparse_moe
        arguments |= {"gating": GATINGS[type(gating)], "training": training}
    biases = [numpy(bias) for bias in experts.biases] or None
    return function(x, [numpy(kernel) for kernel in experts.kernels], biases, **arguments)


def run(layer, x, upstream, *, training, mask=None, way="eager"):
    """One step forward and backward of sum(upstream * y) and all losses.

    Args:
        layer: A layer that is built.
        x: [T, D].
        upstream: [T, D_out].
        training: As in a call.
        mask: As in a call.
        way: "eager", "graph" or "xla", the latter two with a static batch size; or
            "graph, any batch" and "xla, any batch", where the batch size is unknown while tracing.

    Returns:
        Dict of "y", "losses", "routing" and "gradients", which go by the oracle's names.
    """

    def step(x, upstream, mask=None):
        with layer.recorded_routings() as routings:
            y = layer(x, training=training, mask=mask)
        losses = list(layer.losses)
        total = ops.sum(ops.cast(y, "float32") * upstream) + sum(losses)
        return total, {"y": y, "losses": losses, "routing": routings[0]}

    step.layer = layer
    sources = {"kernels": list(layer.experts.kernels), "biases": list(layer.experts.biases)}
    if layer.shared_experts is not None:
        sources["shared_kernels"] = list(layer.shared_experts.kernels)
        sources["shared_biases"] = list(layer.shared_experts.biases)
    sources |= {weight.name: weight for weight in layer.gating.trainable_weights}
    arguments = [np.asarray(x, "float32"), np.asarray(upstream, "float32")]
    if mask is not None:
        arguments.append(np.asarray(mask))
    variables = keras.tree.flatten(sources)
    results, by_tensors, by_variables = with_gradients(step, arguments, variables, way)
    # None, of which Keras' trees make nothing, for what has no gradient.
    found = iter(by_variables)
    gradients = {
        name: [next(found) for _ in source] if isinstance(source, list) else next(found)
        for name, source in sorted(sources.items())
    }
    return {**results, "gradients": {"x": by_tensors[0], **gradients}}


def assert_agrees(layer, x, *, training, mask=None, way="eager"):
    """Compares all that the layer gives, and all gradients; returns the oracle's answer."""
    rng = np.random.default_rng(1)
    upstream = rng.normal(size=layer.compute_output_shape(x.shape)).astype("float32")
    expected = oracle(layer, x, training=training, upstream=upstream, mask=mask)
    again = type(layer).from_config(layer.get_config())  # whose noise is not drawn yet
    again.build(x.shape)
    again.set_weights(layer.get_weights())
    received = run(again, x, upstream, training=training, mask=mask, way=way)
    np.testing.assert_allclose(received["y"], expected.y, rtol=1e-5, atol=1e-5)
    assert_same_routing(received["routing"], expected)
    first_two, others = received["losses"][:2], received["losses"][2:]
    wanted = [expected.importance_loss, expected.load_loss]
    np.testing.assert_allclose(first_two, wanted, rtol=1e-5, atol=1e-6)
    wanted = expected.router_z_loss + expected.batchwise_loss
    np.testing.assert_allclose(np.sum(others), wanted, rtol=1e-5, atol=1e-6)
    if layer.capacity_factor is not None:
        # Evaluation drops nothing, and doesn't count as that.
        metric = metrics(again)["fraction_dropped"]
        np.testing.assert_allclose(metric, expected.fraction_dropped, rtol=1e-6)
    assert_same_gradients(received["gradients"], expected.gradients, training)
    return expected


def assert_same_routing(received, expected):
    gates, index = numpy(received.gates), numpy(received.expert_index)
    # Under XLA there are places for every choice that there could be.
    pad = [(0, 0), (0, gates.shape[1] - expected.gates.shape[1])]
    wanted_index = np.pad(expected.expert_index, pad, constant_values=-1)
    wanted_gates = np.pad(expected.gates, pad)
    if pad[1][1]:
        # Of two levels the free places are those of each group: bring them to the end.
        order = np.argsort(gates == 0, axis=1, kind="stable")
        gates, index = (np.take_along_axis(part, order, axis=1) for part in (gates, index))
        order = np.argsort(wanted_index < 0, axis=1, kind="stable")
        wanted_index = np.take_along_axis(wanted_index, order, axis=1)
        wanted_gates = np.take_along_axis(wanted_gates, order, axis=1)
    np.testing.assert_allclose(gates, wanted_gates, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.where(wanted_index < 0, -1, index), wanted_index)
    for name in ("importance", "load"):
        wanted = getattr(expected, name).ravel()
        np.testing.assert_allclose(getattr(received, name), wanted, rtol=1e-5, atol=1e-5)


def assert_same_gradients(received, expected, training):
    for name, gradient in received.items():
        ours = keras.tree.flatten(gradient)
        if not ours:
            continue  # Biases that the layer does without.
        for our, their in zip(ours, keras.tree.flatten(expected[name]), strict=True):
            if our is None:
                assert name in IDLE_AT_INFERENCE and not training, name
                our = np.zeros_like(their)
            np.testing.assert_allclose(our, their, rtol=1e-4, atol=1e-4, err_msg=name)


def metrics(layer):
    """What the layer logs by the part of the names behind the slash, its last call counted."""
    _ = layer.losses
    logs = {name: value for metric in layer.metrics for name, value in metric.result().items()}
    return {name.rpartition("/")[2]: value for name, value in logs.items()}


def language_model(policy=None, moe=None, **kwargs):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.layers.Embedding(50, 8, mask_zero=True, dtype=policy),
            moe or SparseMoE(8, 16, k=2, name="moe", dtype=policy, **kwargs),
            keras.layers.Dense(50, dtype=policy),
        ]
    )


def next_words(batch=32, length=10):
    """Sequences that count upwards, of unequal length, padded with 0."""
    rng = np.random.default_rng(0)
    start = rng.integers(1, 20, size=(batch, 1))
    x = start + np.arange(length)
    x[np.arange(length) >= rng.integers(3, length, size=(batch, 1))] = 0
    return x, np.where(x > 0, x + 1, 0)


CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


# One of each way through the layer, all of five or six experts: arguments to change are options.
EVERY_LAYER = {
    "noisy_top_k": lambda **options: SparseMoE(5, 4, **{"k": 2, **options}),
    "softmax": lambda **options: SparseMoE(5, 4, gating="softmax", **options),
    "strictly_balanced": lambda **options: SparseMoE(
        5, 4, **{"k": 2, "gating": "strictly_balanced", **options}
    ),
    "capacity": lambda **options: SparseMoE(5, 4, **{"k": 2, "capacity_factor": 1.0, **options}),
    "balanced_capacity": lambda **options: SparseMoE(
        5, 4, **{"k": 2, "gating": "strictly_balanced", "capacity_factor": 1.0, **options}
    ),
    "hierarchical": lambda **options: HierarchicalMoE(2, 3, 4, **options),
    "hierarchical_capacity": lambda **options: HierarchicalMoE(
        2, 3, 4, **{"capacity_factor": 1.0, **options}
    ),
}

every_layer = pytest.mark.parametrize("make", EVERY_LAYER.values(), ids=EVERY_LAYER.keys())


def call_and_gradients(layer, x, *, training, mask=None):
    """Output, losses, and all gradients of their sum: by `x`, then by every trainable weight."""
    y, losses, gradients, _ = call_gradients_and_routing(layer, x, training=training, mask=mask)
    return y, losses, gradients


def call_gradients_and_routing(layer, x, *, training, mask=None):
    """The same and the `Routing` of the call."""

    def step(x):
        with layer.recorded_routings() as routings:
            y = layer(x, training=training, mask=mask)
        losses = list(layer.losses)
        total = ops.sum(y) + sum(ops.cast(loss, y.dtype) for loss in losses)
        return total, {"y": y, "losses": losses, "routing": routings[0]}

    step.layer = layer
    results, by_x, by_weights = with_gradients(
        step, [np.asarray(x)], layer.trainable_weights, unconnected="zero"
    )
    return results["y"], results["losses"], [*by_x, *by_weights], results["routing"]
