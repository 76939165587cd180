"""The largest entries, found in the way of CPUs and in that of GPUs."""

import numpy as np
import pytest
import tensorflow as tf

from keras_moe.backend.tensorflow import choices, devices

LOWEST = np.finfo("float32").min


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("way", [0, 1], ids=["CPU", "GPU"])
@pytest.mark.parametrize(
    ("shape", "k"), [((50, 7), 3), ((50, 7), 7), ((3, 1), 1), ((0, 5), 2), ((9, 1001), 2)], ids=str
)
def test_the_largest_come_first_and_equal_ones_in_order_of_index(shape, k, way, in_graph):
    x = np.random.default_rng(0).integers(0, 4, size=shape).astype("float32")
    x[:1] = LOWEST  # A row without a number, as gatings have it.
    order = np.argsort(-x, axis=1, kind="stable")[:, :k]
    with devices.choosing(way):
        find = tf.function(choices.top_k) if in_graph else choices.top_k
        values, index = find(tf.constant(x), k)
    np.testing.assert_array_equal(index, order)
    np.testing.assert_array_equal(values, np.take_along_axis(x, order, axis=1))


@pytest.mark.parametrize("way", [0, 1], ids=["CPU", "GPU"])
def test_the_gradient_goes_to_the_entries_that_were_chosen(way):
    x = tf.constant([[1.0, 3.0, 2.0], [5.0, 4.0, 5.0]])
    with devices.choosing(way), tf.GradientTape() as tape:
        tape.watch(x)
        values, _ = choices.top_k(x, 2)
    # The largest of each row get 10 and 30, the second 20 and 40.
    upstream = tf.constant([[10.0, 20.0], [30.0, 40.0]])
    found = tape.gradient(values, x, upstream)
    np.testing.assert_array_equal(found, [[0.0, 10.0, 20.0], [30.0, 0.0, 40.0]])
