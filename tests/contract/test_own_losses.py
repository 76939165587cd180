"""Losses that cannot be read, and layers that add none: loops, branches, weights of 0."""

import warnings

import keras
import numpy as np
import pytest
from combinations import few_in_jax
from helpers import EVERY_LAYER, WIDTH, every_layer, examples, numpy, with_random_weights
from keras import ops

from keras_moe import NoisyTopKGating, SparseMoE

NO_LOSSES = {"importance_loss_weight": 0.0, "load_loss_weight": 0.0}
SOME = {name: EVERY_LAYER[name] for name in ("noisy_top_k", "balanced_capacity", "hierarchical")}
JAX = keras.config.backend() == "jax"
QUIET = "noisy_top_k without noise"
SEQUENCES = np.random.default_rng(0).normal(size=(8, 5, WIDTH)).astype("float32")


class InAnother(keras.layers.Layer):
    """A layer of a user's own around a mixture."""

    def __init__(self, moe):
        super().__init__()
        self.moe = moe

    def build(self, shape):
        self.moe.build(shape)

    def call(self, x, training=None):
        return self.moe(x, training=training)


class Cell(InAnother):
    """A recurrent cell around a mixture."""

    state_size = output_size = WIDTH

    def build(self, shape):
        self.moe.build((None, WIDTH))

    def call(self, x, states, training=None):
        h = ops.tanh(x + self.moe(states[0], training=training))
        return h, [h]


def recurrent(moe, **options):
    model = keras.Sequential([keras.Input((5, WIDTH)), keras.layers.RNN(Cell(moe), **options)])
    model.compile("sgd", "mse")
    return model


@pytest.mark.parametrize("make", few_in_jax(SOME, ["noisy_top_k", "balanced_capacity"]))
def test_a_layer_without_losses_works_in_a_recurrent_cell(make):
    moe = with_random_weights(make(**NO_LOSSES, name="moe"))
    moe.gating.batchwise_loss_weight = 0.0
    if JAX:  # Where Keras itself draws no noise in a loop (3.15).
        moe.gating.noise = False
    model = recurrent(moe)
    before = [numpy(kernel).copy() for kernel in moe.experts.kernels]
    with warnings.catch_warnings():
        # L_batchwise alone has a gradient for thresholds.
        warnings.filterwarnings("ignore", message="Gradients do not exist.*thresholds")
        logs = model.fit(SEQUENCES, SEQUENCES[:, 0], verbose=0).history
    assert all(np.any(k != b) for k, b in zip(moe.experts.kernels, before, strict=True))
    if not JAX:  # Where nothing but the cell's state leaves a loop.
        assert logs["moe/max_over_mean_load"][0] >= 1.0
        logs = model.evaluate(SEQUENCES, SEQUENCES[:, 0], verbose=0, return_dict=True)
        assert logs["moe/max_over_mean_load"] >= 1.0
    assert model.predict(SEQUENCES, verbose=0).shape == (8, WIDTH)


@pytest.mark.parametrize(
    "options",
    [
        {"gating": QUIET},
        {"gating": QUIET, "load_loss_weight": 0.0},
        {"gating": "softmax", **NO_LOSSES, "router_z_loss_weight": 0.1},
        {**NO_LOSSES, "gating": "strictly_balanced"},
    ],
    ids=str,
)
def test_losses_in_a_recurrent_cell_are_left_out_with_a_warning_when_they_are_read(options):
    if options["gating"] is QUIET:
        options = {**options, "gating": NoisyTopKGating(4, 2, noise=False)}
    model = recurrent(SparseMoE(4, 8, k=2, **options))
    message = "cannot leave the loop.*unroll=True.*set the weights of all its losses to 0"
    with warnings.catch_warnings():
        # Without losses nothing has a gradient for thresholds.
        warnings.filterwarnings("ignore", message="Gradients do not exist.*thresholds")
        with pytest.warns(UserWarning, match=message):
            logs = model.fit(SEQUENCES, SEQUENCES[:, 0], verbose=0).history
    # The loss is that of the outputs alone, in a step that the weights came before.
    assert np.isfinite(logs["loss"][0])


def test_of_losses_that_nobody_reads_nobody_is_warned():
    model = recurrent(SparseMoE(4, 8, k=2))
    assert model.predict(SEQUENCES, verbose=0).shape == (8, WIDTH)


def test_losses_in_an_unrolled_cell_are_those_of_all_steps():
    cell = Cell(SparseMoE(4, 8, k=2))
    model = keras.Sequential([keras.Input((2, WIDTH)), keras.layers.RNN(cell, unroll=True)])
    model.compile("sgd", "mse")
    model.fit(SEQUENCES[:, :2], SEQUENCES[:, 0], verbose=0)
    model(SEQUENCES[:, :2], training=True)
    assert len(model.losses) == 2 * 2


class Branch(InAnother):
    def call(self, x, training=None):
        return ops.cond(ops.sum(x) > 0, lambda: self.moe(x, training=training), lambda: x)


def test_losses_in_a_branch_are_left_out_with_a_warning_when_they_are_read():
    # Without noise: under JAX Keras itself draws none in a branch (3.15).
    moe = SparseMoE(4, 8, gating=NoisyTopKGating(4, 2, noise=False))
    branch = Branch(moe)
    model = keras.Sequential([keras.Input((WIDTH,)), branch])
    model.compile("sgd", "mse")
    x = examples()
    model.predict(x, verbose=0)  # Nobody reads them.
    with pytest.warns(UserWarning, match="cannot leave the loop or branch"):
        model.train_on_batch(x, x)


@pytest.mark.tensorflow("a tf.while_loop")
def test_losses_are_read_inside_a_loop_within_the_graph_that_they_are_of():
    import tensorflow as tf

    layer = with_random_weights(SparseMoE(4, 8, k=2))

    @tf.function
    def total(x):
        layer(x, training=True)
        return tf.while_loop(
            lambda i, s: i < 3, lambda i, s: (i + 1, s + tf.add_n(layer.losses)), (0, 0.0)
        )[1]

    x = tf.constant(examples())
    layer(x, training=False)
    assert np.isfinite(total(x))


@every_layer
@pytest.mark.parametrize("training", [True, False])
def test_with_weights_of_zero_no_loss_is_added(make, training):
    layer = with_random_weights(make(**NO_LOSSES))
    layer.gating.batchwise_loss_weight = 0.0
    layer(examples(), training=training)
    assert layer.losses == []


def test_a_single_weight_of_zero_keeps_the_order_of_the_losses():
    layer = with_random_weights(SparseMoE(4, 8, k=2, importance_loss_weight=0.0))
    layer(examples(), training=True)
    importance, load = layer.losses
    assert importance == 0.0 and load > 0.0


@pytest.mark.parametrize("around", [lambda moe: moe, InAnother], ids=["alone", "in another layer"])
def test_what_two_calls_add_in_fit_is_the_sum_of_both(around):
    # A loss and numbers of each of its parts: of the mixture, of its gating and of its experts.
    expert = keras.layers.Dense(WIDTH, activity_regularizer="l2")
    gating = NoisyTopKGating(4, 2, noise=False, router_z_loss_weight=0.1)
    moe = SparseMoE(4, experts=expert, gating=gating, capacity_factor=2.0, name="moe")
    with_random_weights(moe)
    x = examples()
    loss, cv_importance = [], []
    for one in (x, -2.0 * x):
        moe(one, training=True)
        loss.append(sum(map(float, moe.losses)))
        importance = numpy(moe.route(one, training=True).importance)
        cv_importance.append(importance.std() / importance.mean())

    layer, inputs = around(moe), keras.Input((WIDTH,))
    model = keras.Model(inputs, layer(inputs) + layer(-2.0 * inputs))
    model.compile("sgd", loss=lambda y, predicted: 0.0 * ops.sum(predicted, axis=-1))
    logs = model.fit(x, x, batch_size=len(x), verbose=0).history
    np.testing.assert_allclose(logs["loss"], [sum(loss)], rtol=1e-5)
    np.testing.assert_allclose(logs["moe/cv_importance"], [np.mean(cv_importance)], rtol=1e-4)


def test_losses_of_others_stay_where_their_places_in_memory_were_used_before():
    def mixture():
        expert = keras.layers.Dense(WIDTH, activity_regularizer="l2")
        return with_random_weights(SparseMoE(4, experts=expert, k=2, capacity_factor=2.0))

    one, other = mixture(), mixture()
    x = ops.convert_to_tensor(examples())
    with keras.StatelessScope(collect_losses=True) as scope:
        one(x, training=True)
        before = list(scope.losses)
        for part in (other, other.gating, other.experts.layers[0]):
            part._loss_ids.update(map(id, before))  # As if they had been there and were freed.
        other(x, training=True)
        assert len(scope.losses) == 2 * len(before)
