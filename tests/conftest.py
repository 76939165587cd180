"""What holds for all tests."""

import importlib.util
import os

import keras
import pytest

pytest_plugins = ["combinations"]

if keras.config.backend() == "jax":
    import jax

    # Devices for the tests of distribution, made as JAX starts. And most of the time goes into
    # compiling programs that run once: they are not optimized, and their loops made in the older
    # way of XLA, as long as it has one, which takes a quarter of the time.
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
    # libtpu ends a process whose flags it doesn't know.
    if jax.__version_info__ < (0, 11) and importlib.util.find_spec("libtpu") is None:
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(flags)
    # On a card what its users run is what matters.
    jax.config.update("jax_disable_most_optimizations", jax.default_backend() == "cpu")


@pytest.fixture
def for_cpus():
    """Nothing but with TensorFlow, whose fixture of this name takes the place of this one."""


if keras.config.backend() == "tensorflow":
    from on_tensorflow import *  # noqa: F403


def pytest_addoption(parser):
    parser.addoption(
        "--gpus", type=int, default=1, help="logical GPUs to make of a GPU, if there is one"
    )


# The files that take longest, so that at the end of the tests no process waits for another.
LONGEST = """
    test_word_dtypes test_examples_language_model test_distribute_saving test_gradients_of_exports
    test_serving_export test_distribute_training test_fuzz test_distribution test_contract
    test_check_numerics test_multi_worker test_examples_translation test_survival_training
    test_pages test_language_model_presets test_numerics test_recompute_memory test_devices
    test_examples_balance test_distribute test_examples_compress test_word_metrics
    test_word_weights test_sparse_moe_in_keras test_vectorization test_examples_multi_gpu
    test_training test_examples_capacity test_distribute_optimizer test_capacity
    test_optimizers_in_keras test_outer_recomputation test_balance_logs test_own_losses
    test_placement test_lora test_serving_without_python test_examples_multi_worker
""".split()


@pytest.hookimpl(specname="pytest_collection_modifyitems")  # on_tensorflow.py has one, too.
def pytest_longest_first(items):
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_runtest_setup(item):
    """Skips what only TensorFlow has, where another backend runs the tests."""
    for mark in item.iter_markers("tensorflow"):
        if keras.config.backend() != "tensorflow":
            pytest.skip(mark.args[0])


def pytest_ignore_collect(collection_path, config):
    """Leaves out the tests of another backend than the one that is here."""
    if collection_path.name == "on_jax" and keras.config.backend() != "jax":
        return True
