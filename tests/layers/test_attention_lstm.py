"""`AttentionLSTM` beside a loop in NumPy."""

import keras
import numpy as np
import pytest
from gradients import with_gradients
from keras import ops
from keras.ops import convert_to_numpy as numpy
from reference_attention import product_attention

from keras_moe.layers import AttentionLSTM

BATCH, STEPS, SOURCES, WIDTH, CONTEXT, UNITS, PROJECTION = 2, 4, 3, 2, 5, 6, 3
MASK = np.array([[True, True, True], [True, False, False]])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def reference(x, source, weights):
    """Outputs [B, T, P] and the weights of the source [B, T, S]."""
    query_kernel, key_kernel, scale, kernel, recurrent, bias, projection = weights
    outputs, attended = np.zeros((BATCH, STEPS, PROJECTION)), np.zeros((BATCH, STEPS, SOURCES))
    h, c = np.zeros((BATCH, PROJECTION)), np.zeros((BATCH, UNITS))
    for t in range(STEPS):
        context, chances, _ = product_attention(
            h[:, None], source, source, query_kernel, key_kernel, scale, MASK
        )
        read = np.concatenate([x[:, t], context[:, 0]], axis=-1)
        i, f, g, o = np.split(read @ kernel + h @ recurrent + bias, 4, axis=-1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = (sigmoid(o) * np.tanh(c)) @ projection
        outputs[:, t], attended[:, t] = h, chances[:, 0]
    return outputs, attended


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    layer = AttentionLSTM(UNITS, PROJECTION)
    layer.build((None, None, WIDTH), (None, None, CONTEXT))
    layer.set_weights([rng.normal(size=weight.shape) for weight in layer.weights])
    shapes = ((BATCH, STEPS, WIDTH), (BATCH, SOURCES, CONTEXT))
    return layer, *(rng.normal(size=shape).astype("float32") for shape in shapes)


def weights_of(layer):
    attention, cell = layer.attention, layer.cell
    return [
        attention.query_kernel,
        attention.key_kernel,
        attention.scale,
        cell.kernel,
        cell.recurrent_kernel,
        cell.bias,
        cell.projection_kernel,
    ]


def test_outputs_equal_a_loop(case):
    layer, x, source = case
    arrays = [numpy(weight).astype("float64") for weight in weights_of(layer)]
    expected = reference(x, source, arrays)
    received = layer(x, source, source_mask=MASK, return_attention_scores=True)
    for ours, wanted in zip(received, expected, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5)


def test_gradients_in_a_graph_of_any_shape_equal_differences(case):
    layer, x, source = case

    def loss(x, source):
        return ops.sum(layer(x, source, source_mask=MASK) ** 2), ()

    _, *gradients = with_gradients(loss, [x, source], weights_of(layer), "graph, any length")
    arrays = [x, source, *map(numpy, weights_of(layer))]
    arrays = [array.astype("float64") for array in arrays]
    rng = np.random.default_rng(1)
    for i, gradient in enumerate(sum(map(list, gradients), [])):
        # The derivative along a random direction.
        direction, ends = rng.normal(size=gradient.shape), []
        for sign in (1, -1):
            moved = [*arrays[:i], arrays[i] + sign * 1e-5 * direction, *arrays[i + 1 :]]
            ends.append(np.sum(reference(moved[0], moved[1], moved[2:])[0] ** 2))
        expected = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(np.sum(gradient * direction), expected, rtol=1e-3, atol=1e-3)


def test_a_step_of_several_queries_is_that_step_of_each(case):
    layer, x, source = case
    memory = layer.attention.remember(source, MASK)
    whole = numpy(layer(x, source, source_mask=MASK))
    states = layer.initial_states(BATCH, 3)
    for t in range(STEPS):
        several = np.repeat(x[:, t, None], 3, axis=1)
        h, states, weights = layer.step(several, states, memory)
        np.testing.assert_allclose(h, np.repeat(whole[:, t, None], 3, axis=1), rtol=1e-5, atol=1e-6)
        assert weights.shape == (BATCH, 3, SOURCES)


@pytest.mark.parametrize("attention", ["product", "additive"])
def test_config_round_trip(attention):
    layer = AttentionLSTM(UNITS, PROJECTION, attention, name="first", dtype="mixed_bfloat16")
    again = AttentionLSTM.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    assert type(again.attention) is type(layer.attention)
    x = keras.Input((None, WIDTH))
    assert again(x, keras.Input((None, CONTEXT))).shape == (None, None, PROJECTION)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="'product', 'additive'.*Received: 'dot'"):
        AttentionLSTM(2, 2, "dot")
    with pytest.raises(ValueError, match="Received: 0"):
        AttentionLSTM(2, 0)
