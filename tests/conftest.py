"""What holds for all tests."""

import gc

import pytest
import tensorflow as tf

# For strategies with several replicas. There is no way to have more once TensorFlow has started.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 8
)


@pytest.fixture(autouse=True, scope="module")
def frozen_heap():
    """Has the garbage collector pass over what imports and earlier test files have left.

    That is over a million objects, since TensorFlow keeps every graph with a custom gradient. Keras
    collects whenever a variable of a layer is deleted: `quantize` would take ten times as long.
    """
    gc.collect()
    gc.freeze()
