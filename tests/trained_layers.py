"""Trained layers, and what is made of them: what the tests of surgery share."""

import textwrap

import keras
import numpy as np
from helpers import WIDTH, assign_random_weights

import keras_moe

# A few steps are quicker so than traced; with JAX, which compiles each operation, slower.
QUICK_EAGERLY = keras.config.backend() == "tensorflow"
X = np.random.default_rng(0).normal(size=(50, WIDTH)).astype("float32")


def trained(layer, scale=0.5):
    """A built layer with weights far from the initial ones, small enough to compare outputs."""
    layer(X)
    assign_random_weights(layer, np.random.default_rng(1))
    for weight in layer.weights:
        weight.assign(scale * weight)
    return layer


def arrays(layer):
    return [keras.ops.convert_to_numpy(weight) for weight in layer.weights]


def assert_same(before, after):
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


def assert_trains_saves_and_loads(layer, tmp_path):
    """`layer` inside a model: `fit` lowers the loss, and a saved model predicts the same."""
    model = keras.Sequential([keras.Input((WIDTH,)), layer])
    model.compile(keras.optimizers.Adam(0.01), "mse", run_eagerly=QUICK_EAGERLY)
    history = model.fit(X, np.sin(X), epochs=6, verbose=0).history["loss"]
    assert history[-1] < 0.9 * history[0]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    expected = model.predict(X, verbose=0)
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), expected)


def run_example(function, model):
    """Runs the example of a docstring and returns what it makes of the model."""
    code = function.__doc__.split("```python\n")[1].split("```")[0]
    names = {"model": model, "keras_moe": keras_moe, "keras": keras, "np": np, "x_val": X}
    exec(textwrap.dedent(code), names)
    return names["model"]
