"""What only a GPU can show: `make test-gpu` runs these, and the numerics of other tests, on one."""

import contextlib

import numpy as np
import pytest
import replicas
import tensorflow as tf

from keras_moe import NoisyTopKGating

pytestmark = pytest.mark.skipif(
    not tf.config.list_physical_devices("GPU"), reason="there is no GPU"
)


@contextlib.contextmanager
def tensor_float_32():
    tf.config.experimental.enable_tensor_float_32_execution(True)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(False)


def relative_error_of_a_product():
    a, b = np.random.default_rng(0).normal(size=(2, 512, 512)).astype("float32")
    exact = a.astype("float64") @ b.astype("float64")
    with tf.device("GPU:0"):
        product = tf.matmul(a, b).numpy()
    return np.linalg.norm(product - exact) / np.linalg.norm(exact)


def test_the_tests_multiply_in_float32():
    # float32 has 24 bits, TensorFloat-32 has 11: relative errors about 2^-24 and 2^-12.
    assert relative_error_of_a_product() < 2**-20
    with tensor_float_32():
        assert relative_error_of_a_product() > 2**-14


@pytest.mark.parametrize("exact", [True, False])
def test_the_choice_of_experts_is_that_of_a_cpu(exact):
    # The logits are sums of 1024 products with a standard deviation of 1. Between the fourth and
    # the fifth of 256 there is about 0.1. Errors of float32, some 1e-6, make at most some 1e-5 of
    # the examples choose otherwise; those of TensorFloat-32, some 1e-3, about 1 %.
    gating = NoisyTopKGating(256, 4, noise=False)
    x = np.random.default_rng(1).normal(size=(4096, 1024)).astype("float32")
    gating.build(x.shape)
    kernel = np.random.default_rng(2).normal(size=(1024, 256)) / 32
    gating.gate_kernel.assign(kernel)
    chosen = []
    with contextlib.nullcontext() if exact else tensor_float_32():
        for device in ("CPU:0", "GPU:0"):
            with tf.device(device):
                chosen.append(np.sort(gating(tf.constant(x)).expert_index, axis=-1))
    assert (chosen[0] != chosen[1]).any(axis=-1).sum() <= 2


def test_two_replicas_are_two_gpus():
    if len(tf.config.list_logical_devices("GPU")) == 1:
        pytest.skip("one GPU alone; of one card pytest --gpus 2 makes two")
    devices = replicas.strategy(2).extended.worker_devices
    assert [tf.DeviceSpec.from_string(device).device_type for device in devices] == ["GPU"] * 2
