"""The choice between two ways by the device that runs the operation."""

import functools
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from combinations import covering
from helpers import EVERY_LAYER, WIDTH, assert_agrees, examples, with_random_weights
from tensorflow.core.protobuf import saved_model_pb2

from keras_moe import SparseMoE, export_saved_model
from keras_moe.backend.tensorflow import devices
from keras_moe.backend.tensorflow.devices import by_device

pytestmark = pytest.mark.cpu  # It is taken for a GPU here.


def which(x):
    """The number of the way, in the shape of `x`."""
    return by_device(lambda: tf.zeros_like(x), lambda: tf.ones_like(x))


def everywhere(x):
    """Ways in a graph, a loop, a branch, a gradient and inside of a way."""

    @tf.custom_gradient
    def with_gradient(x):
        return tf.identity(x), lambda _: which(x)

    with tf.GradientTape() as tape:
        tape.watch(x)
        y = with_gradient(x)
    return [
        which(x),
        tf.while_loop(lambda i, _: i < 2, lambda i, _: (i + 1, which(x)), (0, x))[1],
        tf.cond(tf.reduce_sum(x) > 0, lambda: which(x), lambda: x),
        tape.gradient(y, x),
        by_device(lambda: which(x), lambda: which(x)),
    ]


@pytest.fixture(params=[0, 1], ids=["CPU", "GPU"])
def way(request, monkeypatch):
    """Has this CPU taken for what it is, or for a GPU: all but the name is as on one."""
    if request.param:
        monkeypatch.setattr(devices, "_NAMES", ["CPU"])
    return request.param


@pytest.mark.parametrize("in_graph", [False, True])
def test_the_device_chooses(way, in_graph):
    x = tf.fill([2], 5.0)
    for y in (tf.function(everywhere) if in_graph else everywhere)(x):
        np.testing.assert_array_equal(y, np.full(2, way))


def test_the_device_of_a_replica_chooses(way):
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    run = tf.function(lambda: strategy.run(everywhere, (tf.fill([2], 5.0),)))
    for y in run():
        for part in strategy.experimental_local_results(y):
            np.testing.assert_array_equal(part, np.full(2, way))


def test_one_graph_has_both_ways():
    with devices.for_any_device(None):
        graph = tf.function(which).get_concrete_function(tf.TensorSpec([2])).graph
    (choice,) = [o for o in graph.get_operations() if o.type in ("Case", "StatelessCase")]
    assert choice.inputs[0].op.type == "DeviceIndex"
    assert choice.inputs[0].op.get_attr("device_names") == [b"GPU"]
    assert len(choice.get_attr("branches")) == 2


def choices(folder):
    """How often the device chooses in an export."""
    (graph,) = saved_model_pb2.SavedModel.FromString(
        (folder / "saved_model.pb").read_bytes()
    ).meta_graphs
    functions = graph.graph_def.library.function
    return sum(node.op == "DeviceIndex" for f in functions for node in f.node_def)


def test_an_export_has_both_ways_and_training_that_of_its_machine(tmp_path):
    layer = SparseMoE(4, 8, k=2)
    model = keras.Sequential([keras.Input((WIDTH,)), layer])
    model.export(tmp_path / "by_keras", verbose=False)
    assert choices(tmp_path / "by_keras") > 0
    assert choices(pathlib.Path(export_saved_model(model, tmp_path / "for_serving"))) > 0
    for training in (True, False):
        call = tf.function(functools.partial(layer, training=training))
        graph = call.get_concrete_function(tf.TensorSpec([None, WIDTH])).graph
        assert b"DeviceIndex" not in graph.as_graph_def().SerializeToString()


CASES = {
    "training": (24, True),
    "24 examples": (24, False),
    "one example": (1, False),
    "none": (0, True),
}


@covering(
    usual=[
        ("noisy_top_k", "training"),
        ("strictly_balanced", "training"),
        ("capacity", "training"),
        ("hierarchical", "training"),
        ("hierarchical_capacity", "training"),
        ("softmax", "24 examples"),
        ("strictly_balanced", "24 examples"),
        ("noisy_top_k", "one example"),
        ("hierarchical", "one example"),
        ("balanced_capacity", "none"),
        ("hierarchical", "none"),
    ],
    name=EVERY_LAYER.keys(),
    case=CASES,
)
def test_layers_agree_with_the_oracle_where_the_device_chooses(name, case, monkeypatch):
    # Without a choice, as all other tests on a CPU see it, a graph has the way of CPUs alone.
    monkeypatch.setattr(devices, "_NAMES", ["CPU"])
    layer = with_random_weights(EVERY_LAYER[name](seed=5))
    number, training = case
    assert_agrees(layer, examples(number), training=training, way="graph, any batch")
