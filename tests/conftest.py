"""What holds for all tests."""

import os

import keras
import pytest

if keras.config.backend() == "jax":  # Devices for the tests of distribution, made as JAX starts.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"

if keras.config.backend() == "tensorflow":
    from on_tensorflow import *  # noqa: F403


def pytest_addoption(parser):
    parser.addoption(
        "--gpus", type=int, default=1, help="logical GPUs to make of a GPU, if there is one"
    )


def pytest_runtest_setup(item):
    """Skips what only TensorFlow has, where another backend runs the tests."""
    for mark in item.iter_markers("tensorflow"):
        if keras.config.backend() != "tensorflow":
            pytest.skip(mark.args[0])


def pytest_ignore_collect(collection_path, config):
    """Leaves out the tests of another backend than the one that is here."""
    if collection_path.name == "on_jax" and keras.config.backend() != "jax":
        return True
