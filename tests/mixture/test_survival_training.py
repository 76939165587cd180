"""Every kind of layer stands what `fit` and its options, or fine-tuning, ask of it."""

import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from combinations import few_in_jax
from helpers import EVERY_LAYER, WIDTH, every_layer, with_random_weights
from inputs import policies
from keras.ops import convert_to_numpy as numpy

from keras_moe import NoisyTopKGating

SOME = ("noisy_top_k", "balanced_capacity", "hierarchical")
some_layers = pytest.mark.parametrize("make", [EVERY_LAYER[name] for name in SOME], ids=SOME)
JAX = keras.config.backend() == "jax"
fitted_layers = pytest.mark.parametrize("make", few_in_jax(EVERY_LAYER, ["balanced_capacity"]))
QUICKLY = {"run_eagerly": not JAX}


def regression(make, width=WIDTH, **options):
    """A model [T, D] → [T, D] that repeats from call to call, and its data: 33 examples."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([with_random_weights(make(seed=1, **options)), keras.layers.Dense(2)])
    model.build((None, width))
    rng = np.random.default_rng(1)
    x = rng.normal(size=(33, width)).astype("float32")
    return model, x, rng.normal(size=(33, 2)).astype("float32")


def weights_after_fit(make, compile_options, **options):
    model, x, y = regression(make, **options)
    optimizer = keras.optimizers.SGD(0.01)
    model.compile(optimizer, "mse", **compile_options)
    # Batches of 16, 16 and 1, in order.
    history = model.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    return [numpy(weight) for weight in model.trainable_weights]


@pytest.mark.parametrize(
    "case",
    few_in_jax(
        {
            "noisy_top_k": ("noisy_top_k", {"run_eagerly": True}),
            "balanced_capacity": ("balanced_capacity", {"run_eagerly": True}),
            "hierarchical": ("hierarchical", {"steps_per_execution": 2}),
        },
        ["hierarchical"],  # Eager steps are those of the next test.
    ),
)
def test_a_rest_of_one_and_options_of_compile_change_nothing(case):
    name, options = case
    make = EVERY_LAYER[name]
    plain, other = (weights_after_fit(make, options) for options in ({}, options))
    start = [numpy(weight) for weight in regression(make)[0].trainable_weights]
    assert all(np.any(a != b) for a, b in zip(plain, start, strict=True))
    for a, b in zip(plain, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def without_noise(**options):
    return EVERY_LAYER["capacity"](gating=NoisyTopKGating(5, k=2, noise=False), **options)


@pytest.mark.parametrize("make", [without_noise, EVERY_LAYER["balanced_capacity"]])
def test_xla_changes_nothing_where_nothing_is_random(make):
    compiled, plain = (weights_after_fit(make, {"jit_compile": jit}) for jit in (True, False))
    for a, b in zip(compiled, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@some_layers
def test_gradients_are_accumulated(make):
    model, x, y = regression(make)
    optimizer = keras.optimizers.SGD(0.01, gradient_accumulation_steps=2)
    model.compile(optimizer, "mse", **QUICKLY)
    before = [numpy(weight) for weight in model.trainable_weights]
    model.fit(x[:16], y[:16], verbose=0)
    for weight, old in zip(model.trainable_weights, before, strict=True):
        np.testing.assert_array_equal(weight, old)
    model.fit(x[:16], y[:16], verbose=0)
    for weight, old in zip(model.trainable_weights, before, strict=True):
        assert np.isfinite(weight).all() and np.any(numpy(weight) != old)


@fitted_layers
def test_float16_at_its_limits_leaves_the_weights_finite(make):
    model, x, y = regression(make, dtype="mixed_float16")
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01), 4.0)
    model.compile(optimizer, "mse", **QUICKLY)
    before = [numpy(weight) for weight in model.trainable_weights]
    model.fit(6e4 * np.sign(x), y, batch_size=16, verbose=0)
    for weight in model.trainable_weights:
        assert np.isfinite(weight).all()
    # Infinite gradients: no step, but a smaller scale. Then follows one that counts.
    assert float(optimizer.dynamic_scale) < 4.0
    model.fit(x, y, verbose=0)
    moved = zip(model.trainable_weights, before, strict=True)
    assert all(np.isfinite(weight).all() and np.any(numpy(weight) != old) for weight, old in moved)


@pytest.mark.tensorflow("JAX traces a step for each shape, and pads nothing")
@every_layer
def test_a_time_dimension_of_any_length_is_traced_once(make):
    import tensorflow as tf

    traces = []

    def counting_relu(x):
        traces.append(1)
        return keras.ops.relu(x)

    inputs = keras.Input((None, WIDTH))
    model = keras.Model(inputs, make(activation=counting_relu)(inputs))
    model.compile("sgd", "mse")
    rng = np.random.default_rng(0)

    def batches(lengths):
        for length in lengths:
            yield (rng.normal(size=(3, length, WIDTH)),) * 2

    spec = (tf.TensorSpec((None, None, WIDTH)),) * 2
    for lengths in ([4], [7, 1, 2, 9, 5]):
        number = len(traces)
        data = tf.data.Dataset.from_generator(lambda n=lengths: batches(n), output_signature=spec)
        data = data.apply(tf.data.experimental.assert_cardinality(len(lengths)))
        model.fit(data, shuffle=False, verbose=0)
    assert len(traces) == number > 0


@fitted_layers
def test_fine_tuning_with_the_gating_frozen(make):
    model, x, y = regression(make, use_bias=True)
    layer = model.layers[0]
    layer.gating.trainable = False
    gating = layer.gating.get_weights()
    before = [numpy(weight) for weight in layer.experts.trainable_weights]
    model.compile(keras.optimizers.Adam(0.01), "mse", **QUICKLY)
    model.fit(x, y, verbose=0)
    names = [weight.name for weight in layer.gating.weights]
    for name, now, old in zip(names, layer.gating.get_weights(), gating, strict=True):
        if "seed" not in name:  # The noise goes on.
            np.testing.assert_array_equal(now, old)
    for weight, old in zip(layer.experts.trainable_weights, before, strict=True):
        assert np.any(numpy(weight) != old)


@fitted_layers
def test_a_frozen_layer_stays_as_it_is_and_right(make):
    model, x, y = regression(make)
    layer = model.layers[0]
    expected = numpy(layer(x))
    layer.trainable = False
    assert not layer.trainable_weights
    before = [numpy(weight) for weight in (*layer.gating.weights, *layer.experts.weights)]
    model.compile("adam", "mse", **QUICKLY)
    model.fit(x, y, verbose=0)
    for weight, old in zip((*layer.gating.weights, *layer.experts.weights), before, strict=True):
        if "seed" not in weight.name:
            np.testing.assert_array_equal(weight, old)
    np.testing.assert_array_equal(layer(x), expected)


@fitted_layers
def test_a_layer_shared_by_two_branches_and_its_clone(make):
    inputs = keras.Input((None, WIDTH))
    shared = with_random_weights(make())
    model = keras.Model(inputs, shared(inputs) + shared(2.0 * inputs))
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    x = np.random.default_rng(0).normal(size=(2, 3, WIDTH)).astype("float32")
    np.testing.assert_allclose(clone(x), shared(x) + shared(2 * x), rtol=1e-5, atol=1e-5)
    assert len(clone.losses) == 4  # importance and load, once for each branch
    clone.compile("sgd", "mse", **QUICKLY)
    losses = [clone.train_on_batch(x, x, return_dict=True)["loss"] for _ in range(2)]
    # The balance after the step, in which JAX knows it not yet.
    assert np.isfinite([*losses, *clone.get_metrics_result().values()]).all()


FLOATS = {name: name for name in policies("float64", "float16", "bfloat16")}


@pytest.mark.parametrize("floatx", few_in_jax(FLOATS, ["bfloat16"]))
def test_fit_adds_up_the_losses_whatever_floatx_is(floatx):
    keras.config.set_floatx(floatx)
    keras.config.set_dtype_policy(floatx)
    try:
        for make in (EVERY_LAYER["strictly_balanced"], EVERY_LAYER["hierarchical_capacity"]):
            model, x, y = regression(make, kernel_regularizer="l2", router_z_loss_weight=0.01)
            model.compile(keras.optimizers.SGD(1e-3), "mse", **QUICKLY)
            (loss,) = model.fit(x, y, verbose=0).history["loss"]
            assert np.isfinite(float(loss))
            dtypes = {keras.backend.standardize_dtype(loss.dtype) for loss in model.losses}
            assert dtypes == {floatx}
    finally:
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("float32")


DETERMINISM = """
import keras, numpy as np, tensorflow as tf
tf.config.experimental.enable_op_determinism()
from helpers import EVERY_LAYER
x, y = np.random.default_rng(0).normal(size=(2, 32, 6)).astype("float32")
for name, make in EVERY_LAYER.items():
    runs = []
    for _ in range(2):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([make(num_shared_experts=1)])
        model.compile("adam", "mse", run_eagerly=True)
        model.fit(x, y, batch_size=16, verbose=0)
        runs.append(model.get_weights() + [np.array(model(x))])
    assert all(np.array_equal(a, b) for a, b in zip(*runs, strict=True)), name
    print(name)
"""


@pytest.mark.tensorflow("there it is an option")
def test_runs_are_equal_to_the_bit_with_deterministic_operations():
    # In a process of its own, since there is no way back.
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", DETERMINISM],
        env={"PYTHONPATH": f"{tests}:{tests.parent}", "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(EVERY_LAYER)
