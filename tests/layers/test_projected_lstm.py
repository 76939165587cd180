"""`ProjectedLSTM` beside a loop in NumPy, and beside Keras' LSTM where there is nothing between."""

import keras
import numpy as np
import pytest
from keras.ops import convert_to_numpy as numpy

from keras_moe.layers import ProjectedLSTM

BATCH, LENGTH, WIDTH, UNITS, PROJECTION = 3, 5, 4, 6, 2


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def reference(x, kernel, recurrent, bias, projection, mask):
    """The outputs of all steps [B, L, P], row by row and step by step."""
    outputs = np.zeros((*x.shape[:2], projection.shape[1]))
    for row in range(len(x)):
        h, c = np.zeros(projection.shape[1]), np.zeros(projection.shape[0])
        for step in range(x.shape[1]):
            if mask[row, step]:
                i, f, g, o = np.split(x[row, step] @ kernel + h @ recurrent + bias, 4)
                c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
                h = (sigmoid(o) * np.tanh(c)) @ projection
            outputs[row, step] = h  # Keras repeats the last output where a step is masked.
    return outputs


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    layer = ProjectedLSTM(UNITS, PROJECTION, return_sequences=True)
    layer.build((None, None, WIDTH))
    layer.set_weights([rng.normal(size=weight.shape) for weight in layer.weights])
    return layer, rng.normal(size=(BATCH, LENGTH, WIDTH)).astype("float32")


def weights_of(layer):
    cell = layer.cell
    parts = (cell.kernel, cell.recurrent_kernel, cell.bias, cell.projection_kernel)
    return [numpy(weight).astype("float64") for weight in parts]


@pytest.mark.parametrize("masked", [False, True])
def test_outputs_equal_a_loop(case, masked):
    layer, x = case
    mask = np.ones((BATCH, LENGTH), bool)
    if masked:
        mask[0, 3:] = mask[2, 1] = False
    received = layer(x, mask=mask if masked else None)
    expected = reference(x.astype("float64"), *weights_of(layer), mask)
    np.testing.assert_allclose(received, expected, rtol=1e-4, atol=1e-5)


def test_with_the_identity_for_a_projection_it_is_keras_lstm():
    x = np.random.default_rng(1).normal(size=(BATCH, LENGTH, WIDTH)).astype("float32")
    theirs = keras.layers.LSTM(UNITS, return_sequences=True)
    ours = ProjectedLSTM(UNITS, UNITS, return_sequences=True)
    for layer in (theirs, ours):
        layer.build((None, None, WIDTH))
    ours.set_weights([*theirs.get_weights(), np.eye(UNITS)])
    np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


def test_it_begins_as_keras_lstm_does():
    theirs, ours = keras.layers.LSTM(UNITS), ProjectedLSTM(UNITS, PROJECTION)
    for layer in (theirs, ours):
        layer.build((None, None, WIDTH))
    np.testing.assert_array_equal(ours.cell.bias, theirs.cell.bias)


def test_gradients_equal_differences(case):
    layer, x = case
    model = keras.Sequential([keras.Input((LENGTH, WIDTH)), layer])
    model.compile(keras.optimizers.SGD(1e-2), "mse")
    target = np.zeros((BATCH, LENGTH, PROJECTION), "float32")
    before = weights_of(layer)
    model.train_on_batch(x, target)
    steps = [(old - new) / 1e-2 for old, new in zip(before, weights_of(layer), strict=True)]
    mask, rng = np.ones((BATCH, LENGTH), bool), np.random.default_rng(2)

    def loss(weights):
        return np.mean(reference(x.astype("float64"), *weights, mask) ** 2)

    for i, gradient in enumerate(steps):
        # The derivative along a random direction.
        direction = rng.normal(size=gradient.shape)
        ends = []
        for sign in (1, -1):
            moved = list(before)
            moved[i] = before[i] + sign * 1e-5 * direction
            ends.append(loss(moved))
        expected = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-3, atol=1e-4)


def test_saved_model_comes_back(case, tmp_path):
    layer, x = case
    model = keras.Sequential([keras.Input((None, WIDTH)), layer])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))
    assert loaded.layers[0].get_config() == layer.get_config()


@pytest.mark.parametrize("sizes", [(0, 2), (2, 0)])
def test_bad_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="Received: .*0"):
        ProjectedLSTM(*sizes)
