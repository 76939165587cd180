"""Recomputation by others: tf.recompute_grad, keras.remat and keras.RematScope around a mixture."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from combinations import covering
from helpers import EVERY_LAYER, WIDTH, every_layer, examples, with_random_weights

from keras_moe import HierarchicalMoE, LayerExperts, SparseMoE

LOSSES = {"router_z_loss_weight": 0.3, "seed": 5}


def value_and_gradients(layer, call, x, watch=True):
    """Loss values, and the gradients of their sum and of the output by x and all weights."""
    with tf.GradientTape() as tape:
        if watch:
            tape.watch(x)
        y = call(x)
        losses = list(layer.losses)
        # In another order than Keras adds them up.
        total = tf.add_n([*losses, tf.reduce_sum(tf.sin(tf.cast(y, tf.float32)))])
    weights = [weight.value for weight in layer.trainable_weights]
    return y, losses, tape.gradient(total, [x, *weights], unconnected_gradients="zero")


def assert_equal(received, expected):
    for ours, theirs in zip(
        keras.tree.flatten(received), keras.tree.flatten(expected), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def pair(make, **options):
    """Two layers with equal weights and equal seeds."""
    layers = [with_random_weights(make(**LOSSES, **options)) for _ in range(2)]
    layers[1].set_weights(layers[0].get_weights())
    return layers


def in_graphs(*names):
    """Every layer in eager mode, and in graphs, which take longer to trace, these alone."""
    usual = [*((name, "eager") for name in EVERY_LAYER), *((name, "graph") for name in names)]
    return covering(usual, make=EVERY_LAYER, way=["eager", "graph"])


@in_graphs("noisy_top_k", "balanced_capacity", "hierarchical_capacity")
def test_all_gradients_are_those_without_recomputation(make, way):
    recomputed = tf.recompute_grad if way == "eager" else keras.remat
    plain, layer = pair(make)
    x = tf.constant(examples())
    step = value_and_gradients if way == "eager" else tf.function(value_and_gradients)
    expected = step(plain, lambda x: plain(x, training=True), x)
    assert len(expected[1]) >= 3
    received = step(layer, recomputed(lambda x: layer(x, training=True)), x)
    assert_equal(received, expected)


@pytest.mark.parametrize("options", [{"watch": False}, {"watch": True}], ids=str)
def test_an_input_without_gradient_and_the_layer_by_itself(options):
    plain, layer = pair(lambda **kwargs: SparseMoE(5, 4, k=2, num_shared_experts=1, **kwargs))
    x = tf.constant(examples())
    expected = value_and_gradients(plain, lambda x: plain(x, training=True), x, **options)
    received = value_and_gradients(
        layer, lambda x: tf.recompute_grad(layer)(x, training=True), x, **options
    )
    assert_equal(received, expected)


def test_every_call_gets_its_own_noise_again():
    plain, layer = pair(lambda **kwargs: HierarchicalMoE(2, 3, 4, **kwargs))
    x = tf.constant(examples())

    def thrice(call):
        return lambda x: call(call(call(x)) + x)

    again = tf.recompute_grad(lambda x: layer(x, training=True))
    # By themselves the losses are those of the last call, as in any loop.
    expected = value_and_gradients(plain, thrice(lambda x: plain(x, training=True)), x)
    assert_equal(value_and_gradients(layer, thrice(again), x), expected)


def test_a_persistent_tape_recomputes_the_same_each_time():
    layer, _ = pair(lambda **kwargs: SparseMoE(5, 4, k=2, **kwargs))
    with tf.GradientTape(persistent=True) as tape:
        y = tf.recompute_grad(lambda x: layer(x, training=True))(tf.constant(examples()))
    kernels = [kernel.value for kernel in layer.experts.kernels]
    first, again = (tape.gradient(y, kernels) for _ in range(2))
    assert_equal(again, first)


def test_recomputation_within_recomputation():
    plain, layer = pair(lambda **kwargs: SparseMoE(5, 4, k=2, recompute=True, **kwargs))
    x = tf.constant(examples())
    expected = value_and_gradients(plain, lambda x: plain(x, training=True), x)
    inner = tf.recompute_grad(lambda x: layer(x, training=True))
    assert_equal(value_and_gradients(layer, tf.recompute_grad(lambda x: inner(x)), x), expected)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "float64"])
def test_the_input_may_have_another_dtype(policy):
    plain, layer = pair(lambda **kwargs: SparseMoE(5, 4, k=2, dtype=policy, **kwargs))
    x = tf.constant(examples())
    expected = value_and_gradients(plain, lambda x: plain(x, training=True), x)
    received = value_and_gradients(layer, tf.recompute_grad(lambda x: layer(x, training=True)), x)
    for ours, theirs in zip(received[2], expected[2], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0.02, atol=0.02)


def test_losses_of_the_experts():
    expert = keras.layers.Dense(WIDTH, activity_regularizer=keras.regularizers.L2(0.1))
    plain, layer = pair(lambda router_z_loss_weight, **kwargs: SparseMoE(3, experts=expert, k=2))
    plain.gating.seed_generator.state.assign(layer.gating.seed_generator.state)
    x = tf.constant(examples())
    expected = value_and_gradients(plain, lambda x: plain(x, training=True), x)
    received = value_and_gradients(layer, tf.recompute_grad(lambda x: layer(x, training=True)), x)
    assert len(received[1]) == 2 + 3
    assert_equal(received, expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"importance_loss_weight": 0.0},
        {"importance_loss_weight": 0.0, "load_loss_weight": 0.0, "router_z_loss_weight": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("way", ["eager", "graph"])
def test_losses_of_an_input_made_inside_are_refused(way, options):
    dense, layer = keras.layers.Dense(WIDTH), SparseMoE(3, 4, k=2, **options)
    for part in (dense, layer):
        part.build((None, WIDTH))

    def step(x):
        with tf.GradientTape() as tape:
            y = tf.recompute_grad(lambda x: layer(dense(x), training=True))(x)
        return tape.gradient(y, dense.kernel.value)

    with pytest.raises(ValueError, match="`recompute=True`, or set the weights of all its losses"):
        (step if way == "eager" else tf.function(step))(tf.constant(examples()))


@every_layer
def test_without_losses_nothing_is_refused(make):
    layer = make(importance_loss_weight=0.0, load_loss_weight=0.0)
    layer.gating.batchwise_loss_weight = 0.0
    with_random_weights(layer)
    dense = keras.layers.Dense(WIDTH)
    x = tf.constant(examples())
    with tf.GradientTape() as tape:
        y = tf.recompute_grad(lambda x: layer(dense(x), training=True))(x)
    assert layer.losses == []
    assert tape.gradient(y, dense.kernel.value) is not None


def test_evaluation_and_user_stopped_recording_are_not_refused():
    layer, dense = SparseMoE(3, 4, k=2), keras.layers.Dense(WIDTH)
    x = tf.constant(examples())
    tf.recompute_grad(lambda x: layer(dense(x)))(x)
    tf.recompute_grad(lambda x: layer(dense(x), training=False))(x)
    with tf.GradientTape() as tape, tape.stop_recording():
        layer(dense(x), training=True)
    with tf.init_scope():
        layer(dense(x), training=True)


def mixture(**options):
    return SparseMoE(5, 4, k=2, capacity_factor=1.0, name="moe", **{**LOSSES, **options})


@in_graphs("capacity", "strictly_balanced", "hierarchical")
def test_a_remat_scope_changes_no_number(make, way):
    plain = with_random_weights(make(**LOSSES))
    with keras.RematScope():
        layer = make(**LOSSES)
    with_random_weights(layer)
    layer.set_weights(plain.get_weights())
    x = tf.constant(examples())
    step = value_and_gradients if way == "eager" else tf.function(value_and_gradients)
    expected = step(plain, lambda x: plain(x, training=True), x)
    assert_equal(step(layer, lambda x: layer(x, training=True), x), expected)
    assert not layer.experts.recompute  # It says so of itself alone while it is called.


SCOPES = [
    {"mode": "full"},
    {"mode": "activations"},
    {"mode": "larger_than", "output_size_threshold": 1},
    {"mode": "list_of_layers", "layer_names": ["moe"]},
    {"mode": "list_of_layers", "layer_names": ["experts"]},
]
NO_SCOPES = [
    {"mode": None},
    {"mode": "larger_than", "output_size_threshold": 10**6},
    {"mode": "list_of_layers", "layer_names": ["other"]},
]


def times_computed(layer):
    """How often a training step computes the experts' hidden activations."""
    with_random_weights(layer)

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            y = layer(x, training=True)
        return tape.gradient(y, layer.experts.kernels[0].value)

    graph = step.get_concrete_function(tf.TensorSpec((16, WIDTH))).graph
    return sum(op.type == "Relu" for op in graph.get_operations())


@pytest.mark.parametrize(
    ("scope", "number"), [(s, 2) for s in SCOPES] + [(s, 1) for s in NO_SCOPES], ids=str
)
def test_under_a_remat_scope_experts_are_computed_twice(scope, number):
    with keras.RematScope(**scope):
        layer = mixture()
    assert times_computed(layer) == number


def test_layer_experts_in_a_remat_scope():
    def make():
        expert = keras.layers.Dense(WIDTH, activity_regularizer="l2")
        return SparseMoE(3, experts=LayerExperts(3, expert), k=2)

    plain = with_random_weights(make())
    with keras.RematScope():
        layer = make()
    with_random_weights(layer)
    layer.set_weights(plain.get_weights())
    layer.gating.seed_generator.state.assign(plain.gating.seed_generator.state)
    x = tf.constant(examples())
    expected = value_and_gradients(plain, lambda x: plain(x, training=True), x)
    assert_equal(value_and_gradients(layer, lambda x: layer(x, training=True), x), expected)


def test_what_is_private_in_tensorflow_is_still_there():
    from keras_moe.backend import outer_recomputation

    assert outer_recomputation._FORWARD is not None
    assert outer_recomputation._AGAIN is not None
