"""What holds for all tests."""

import os

import keras
import pytest

pytest_plugins = ["combinations"]

if keras.config.backend() == "jax":
    import jax

    # Devices for the tests of distribution, made as JAX starts. And most of the time goes into
    # compiling programs that run once: they are not optimized, and their loops made in the older
    # way of XLA (flags of JAX 0.10), which takes a quarter of the time.
    flags = "--xla_force_host_platform_device_count=8 --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    jax.config.update("jax_disable_most_optimizations", True)

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
