"""The products by which a gating chooses, where a GPU would multiply by TF32."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import EVERY_LAYER, examples, with_random_weights

from keras_moe.backend.tensorflow import devices, exact

matmul = tf.matmul


def in_tf32(a, b, **options):
    """A product of what is left of the factors in TF32: 10 bits behind the first, rounded."""

    def rounded(x):
        bits = np.asarray(x).view("uint32")
        kept = (bits + 0xFFF + (bits >> 13 & 1)) & np.uint32(0xFFFFE000)  # ties to even
        return tf.constant(kept.view("float32"))

    return matmul(rounded(a), rounded(b), **options)


@pytest.fixture
def tf32(monkeypatch):
    """Everything as on a GPU, the rounding included."""
    monkeypatch.setattr(tf, "matmul", in_tf32)
    with devices.choosing(1):
        yield


@pytest.mark.parametrize("batch", [(), (3,)])
def test_a_product_is_exact_to_the_rounding_of_float32(batch, tf32):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(*batch, 20, 512)).astype("float32")
    kernel = rng.normal(size=(*batch, 512, 16)).astype("float32")
    expected = x.astype("float64") @ kernel.astype("float64")
    # What is left out of a product of two numbers is below 2^-21 of it: the product of the lower
    # parts, 2^-11 of either, and their own rounding, 2^-11 of 2^-11. And float32 adds 512 up.
    bound = 2**-21 * (np.abs(x.astype("float64")) @ np.abs(kernel))
    assert (np.abs(exact.by_parts(x, kernel) - expected) < bound).all()
    assert (np.abs(tf.matmul(x, kernel) - expected) > bound).any()  # That is what it is for.
    if not batch:
        np.testing.assert_array_equal(exact.matmul(x, kernel), exact.by_parts(x, kernel))


def test_what_is_not_finite_stays_in_its_row(tf32):
    x = np.ones((4, 3), "float32")
    x[0, 0], x[1, 1], x[2, 2] = np.nan, np.inf, -np.inf
    y = exact.matmul(tf.constant(x), tf.ones([3, 2]))
    np.testing.assert_array_equal(y, [[np.nan] * 2, [np.inf] * 2, [-np.inf] * 2, [3, 3]])


def test_gradients_are_those_of_a_product():
    rng = np.random.default_rng(0)
    x, kernel = (tf.constant(rng.normal(size=size), tf.float32) for size in ((5, 4), (4, 3)))
    upstream = tf.constant(rng.normal(size=(5, 3)), tf.float32)
    for function in (exact.matmul, exact.by_parts):
        with devices.choosing(1), tf.GradientTape() as tape:
            tape.watch([x, kernel])
            y = function(x, kernel)
        of_x, of_kernel = tape.gradient(y, [x, kernel], upstream)
        np.testing.assert_allclose(of_x, upstream @ tf.transpose(kernel), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(of_kernel, tf.transpose(x) @ upstream, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", EVERY_LAYER)
def test_every_gating_chooses_as_on_a_cpu(name, monkeypatch):
    layer = with_random_weights(EVERY_LAYER[name]())
    # A pair of logits each whose difference TF32 can't tell. Of positive terms alone: their sum is
    # exact to 6·2^-24 of itself, in whatever order a device adds, so the difference always shows.
    for kernel in layer.gating.weights:
        if kernel.shape[-1] > 1 and len(kernel.shape) > 1 and "threshold" not in kernel.name:
            columns = keras.ops.convert_to_numpy(kernel).copy()
            columns[..., 0] = np.abs(columns[..., 0])
            columns[..., 1] = columns[..., 0] * (1 + 1e-5)
            kernel.assign(columns)
    x = np.abs(examples(64))
    expected = layer.route(x)
    monkeypatch.setattr(tf, "matmul", in_tf32)
    with devices.choosing(1):
        received = layer.route(x)
    np.testing.assert_array_equal(received.expert_index, expected.expert_index)
    np.testing.assert_allclose(received.gates, expected.gates, rtol=2e-5, atol=1e-6)
