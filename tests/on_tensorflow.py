"""What holds for all tests under TensorFlow."""

import gc
import shutil

import c_api
import pytest
import tensorflow as tf
from exports import train
from tensorflow.python.framework import ops

from keras_moe.backend.tensorflow import devices

# For strategies with several replicas. There is no way to have more once TensorFlow has started.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 8
)

# A trace makes a hundred thousand objects, nearly all of which stay: looking through the young ones
# every 700 of them takes a tenth of the time.
gc.set_threshold(20_000, 20, 20)


def pytest_configure(config):
    """Has a GPU compute as exactly as a CPU does, and makes several of it, for strategies."""
    number = config.getoption("--gpus")
    for gpu in tf.config.list_physical_devices("GPU")[:1]:
        tf.config.experimental.enable_tensor_float_32_execution(False)
        tf.config.set_visible_devices([gpu], "GPU")
        if number == 1:
            tf.config.experimental.set_memory_growth(gpu, True)  # Other processes test beside.
        else:
            part = tf.config.LogicalDeviceConfiguration(memory_limit=2048)
            tf.config.set_logical_device_configuration(gpu, [part] * number)


def pytest_collection_modifyitems(items):
    if tf.config.list_physical_devices("GPU"):
        for item in items:
            if item.get_closest_marker("cpu"):
                item.add_marker(pytest.mark.skip(reason="watches how a CPU computes"))


@pytest.fixture(autouse=True, scope="module")
def frozen_heap():
    """Has the garbage collector pass over what imports and earlier test files have left.

    That is over a million objects. Keras collects whenever a variable of a layer is deleted:
    `quantize` would take ten times as long. Graphs with custom gradients are let go of: TensorFlow
    has them in a registry for good, gigabytes of them (private, checked with 2.21).
    """
    gradients = ops.gradient_registry._registry
    for name in [name for name in gradients if name.startswith("CustomGradient-")]:
        del gradients[name]
    gc.collect()
    gc.freeze()


@pytest.fixture
def for_cpus():
    """Has exports without the way of GPUs, where there is none: most of what there is to trace.

    That exports have both, and what both compute, is for tests/backend and tests/serving.
    """
    if tf.config.list_logical_devices("GPU"):
        yield
    else:
        with devices.choosing(0):
            yield


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    """A program in C that answers as a SavedModel does."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc, which compiles a program that uses TensorFlow's C API, is missing")
    return c_api.compile_server(tmp_path_factory.mktemp("program") / "saved_model_server")


@pytest.fixture(scope="module")
def trained():
    """A trained language model and inputs for it, for tests that change neither."""
    return train()
