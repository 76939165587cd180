"""What the logs of fit and evaluate say of the balance, and what must not change it."""

import functools

import keras
import numpy as np
import pytest
from compiled_once import way_back
from helpers import EVERY_LAYER, WIDTH, assign_random_weights

from keras_moe import NoisyTopKGating, SparseMoE
from keras_moe.callbacks import ExpertLoadReport

X = np.random.default_rng(0).normal(size=(64, WIDTH)).astype("float32")
OTHER = np.ones((4, WIDTH), "float32")


def compiled(make=None, **options):
    keras.utils.set_random_seed(0)
    moe = make(name="moe", seed=0) if make else SparseMoE(8, 8, k=2, name="moe", seed=0)
    model = keras.Sequential([keras.Input((WIDTH,)), moe])
    assign_random_weights(moe, np.random.default_rng(0))
    model.compile(keras.optimizers.SGD(0.0), "mse", metrics=["mae"], **options)
    return model


def without_noise(**options):
    """As a call in training would draw from it, and so change that of the next batch."""
    return SparseMoE(8, 8, gating=NoisyTopKGating(8, k=2, noise=False), **options)


def logs(model, *callbacks, **options):
    history = model.fit(
        X, X[:, : model.output_shape[-1]], batch_size=16, shuffle=False, verbose=0,
        callbacks=list(callbacks), **options,
    ).history  # fmt: skip
    return {name: values[-1] for name, values in history.items()}


def logs_without_and_with(model, *callbacks, **options):
    """The logs of a training, and of the same one with callbacks."""
    go_back = way_back(model)
    expected = logs(model, **options)
    go_back()
    return expected, logs(model, *callbacks, **options)


def each_batch(action):
    class Each(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            action(self.model)

    return Each()


@functools.cache
def traced(model):
    """A compiled function that evaluates a model."""

    def function(x):
        return model(x, training=False)

    if keras.config.backend() == "jax":
        import jax

        return jax.jit(function)
    import tensorflow as tf

    return tf.function(function)


ACTIONS = {
    "predict": lambda model: model.predict(OTHER, verbose=0),
    "predict_on_batch": lambda model: model.predict_on_batch(OTHER),
    "call": lambda model: model(OTHER),
    "call in training": lambda model: model(OTHER, training=True),
    "call in evaluation": lambda model: model(OTHER, training=False),
    "layer": lambda model: model.get_layer("moe")(OTHER, training=False),
    "route": lambda model: model.get_layer("moe").route(OTHER, training=False),
    "graph": lambda model: traced(model)(OTHER),
}


def act(model):
    for action in ACTIONS.values():
        action(model)


@pytest.mark.parametrize(
    "options", [{}] if keras.config.backend() == "jax" else [{}, {"run_eagerly": True}], ids=str
)
def test_what_callbacks_call_changes_no_log(options, tmp_path):
    validation = {"validation_data": (OTHER, OTHER), "epochs": 2}
    callbacks = [each_batch(act), ExpertLoadReport(OTHER, tmp_path)]
    model = compiled(without_noise, **options)
    expected, received = logs_without_and_with(model, *callbacks, **validation)
    assert {"moe/cv_importance", "moe/cv_load", "moe/max_over_mean_load"} < expected.keys()
    assert received == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["hierarchical", "balanced_capacity"])
def test_predict_within_fit(name):
    peek = each_batch(ACTIONS["predict"])
    expected, received = logs_without_and_with(compiled(EVERY_LAYER[name]), peek)
    assert received == pytest.approx(expected, rel=1e-5)


def test_predict_within_evaluate():
    class Peek(keras.callbacks.Callback):
        def on_test_batch_end(self, batch, logs=None):
            self.model.predict(OTHER, verbose=0)

    model = compiled()
    expected = model.evaluate(X, X, batch_size=16, verbose=0, return_dict=True)
    received = model.evaluate(X, X, batch_size=16, verbose=0, return_dict=True, callbacks=[Peek()])
    assert received == pytest.approx(expected, rel=1e-5)


def test_evaluate_within_fit_does_what_it_does_to_keras_own_metrics():
    # Keras starts all metrics anew for an evaluation: behind one after the last batch, `fit` logs
    # that evaluation.
    model = compiled()
    found = []

    def evaluate(model):
        found.append(model.evaluate(OTHER, OTHER, verbose=0, return_dict=True))

    received = logs(model, each_batch(evaluate))
    for name in ("mae", "moe/cv_load", "moe/max_over_mean_load"):
        assert received[name] == pytest.approx(found[-1][name], rel=1e-5)


@pytest.mark.parametrize("options", [{"steps_per_execution": 2}, {"jit_compile": True}], ids=str)
def test_all_ways_to_compile_log_the_same(options):
    def make(**kwargs):
        return without_noise(capacity_factor=1.0, **kwargs)  # XLA would draw another.

    assert logs(compiled(make, **options)) == pytest.approx(logs(compiled(make)), rel=1e-3)


def test_a_loop_of_ones_own_counts_what_it_trains_with():
    layer = compiled().get_layer("moe")
    (metric,) = layer.metrics
    layer(X, training=True)
    assert metric.result()["moe/max_over_mean_load"] == 0.0
    assert len(layer.losses) == 2
    counted = float(metric.result()["moe/max_over_mean_load"])
    assert counted >= 1.0
    assert len(layer.losses) == 2  # Read once more: counted once.
    np.testing.assert_array_equal(metric.count, np.ones(3))


class Block(keras.layers.Layer):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def build(self, shape):
        self.inner.build(shape)

    def call(self, x, training=None):
        return x + self.inner(x, training=training)


NESTED = pytest.mark.tensorflow("under JAX experts with losses are refused in evaluation")


@pytest.mark.parametrize(
    "make, number",
    [
        (lambda: Block(SparseMoE(4, 8, k=2, name="moe")), 3),
        pytest.param(
            lambda: SparseMoE(2, experts=SparseMoE(2, 4, k=1, name="inner"), k=2, name="outer"),
            3 * 3,
            marks=NESTED,
        ),
    ],
    ids=["deep", "nested"],
)
def test_evaluate_lists_each_number_once(make, number):
    model = keras.Sequential([keras.Input((WIDTH,)), Block(make())])
    model.compile("sgd", "mse", metrics=["mae"])
    by_name = model.evaluate(X, X, verbose=0, return_dict=True)
    assert len(by_name) == 2 + number  # loss and mae
    in_order = model.evaluate(X, X, verbose=0)
    assert in_order[:2] == pytest.approx([by_name["loss"], by_name["mae"]])
    assert sorted(in_order) == pytest.approx(sorted(by_name.values()))


def ensemble(*models):
    inputs = keras.Input((WIDTH,))
    return keras.Model(inputs, keras.layers.add([model(inputs) for model in models]))


def test_clones_in_one_model_log_under_names_of_their_own():
    first = compiled()
    second = keras.models.clone_model(first)
    for i, model in enumerate((first, second)):
        model.name = f"model_{i}"
    assign_random_weights(second.get_layer("moe"), np.random.default_rng(7))
    alone = [m.get_layer("moe").route(X) for m in (first, second)]
    loads = [np.array(r.load) for r in alone]
    model = ensemble(first, second)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    received = model.evaluate(X, X, batch_size=64, verbose=0, return_dict=True)
    found = [received["moe/max_over_mean_load"], received["moe_1/max_over_mean_load"]]
    # The order of the two in the model is Keras' own.
    expected = [load.max() / load.mean() for load in loads]
    np.testing.assert_allclose(np.sort(found), np.sort(expected), rtol=1e-5)
    assert {"moe/cv_load", "moe_1/cv_load"} < set(logs(model))


def test_a_clone_by_itself_keeps_the_name():
    model = keras.models.clone_model(compiled())
    model.compile("sgd", "mse")
    assert "moe/cv_load" in model.evaluate(X, X, verbose=0, return_dict=True)
