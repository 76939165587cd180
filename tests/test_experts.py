"""The bank of feed-forward experts."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_moe import FeedForwardExperts


def test_rows_behind_the_last_expert_are_zeros():
    bank = FeedForwardExperts(3, 4, output_dim=2, use_bias=True, bias_initializer="ones")
    y = bank(np.ones((6, 5), "float32"), tf.constant([2, 0, 1]))
    assert y.shape == (6, 2)
    assert np.all(np.any(y[:3], axis=1))
    np.testing.assert_array_equal(y[3:], np.zeros((3, 2)))


def test_each_expert_is_drawn_like_a_layer_of_its_own():
    bank = FeedForwardExperts(50, 32, kernel_initializer="glorot_uniform")
    bank.build((None, 16))
    up, down = (keras.ops.convert_to_numpy(kernel) for kernel in bank.kernels)
    # Glorot: uniform in ±√(6 / (16 + 32)) = ±√(1/8), whose standard deviation is √(1/24).
    for kernel in (up, down):
        assert np.abs(kernel).max() <= 8**-0.5
        np.testing.assert_allclose(kernel.std(axis=(1, 2)), np.full(50, 24**-0.5), rtol=0.1)
    everything = np.stack([up.reshape(50, -1), down.reshape(50, -1)]).reshape(100, -1)
    correlation = np.corrcoef(everything) - np.eye(100)
    assert np.abs(correlation).max() < 0.25  # 512 draws: √(1/512) = 0.044, more than 5 times


@pytest.mark.parametrize(
    "initializer",
    [
        keras.initializers.Orthogonal(seed=1),
        keras.initializers.GlorotUniform(seed=keras.random.SeedGenerator(1)),
    ],
)
def test_seeded_initializers_differ_from_expert_to_expert(initializer):
    bank = FeedForwardExperts(2, 4, kernel_initializer=initializer)
    bank.build((None, 4))
    kernels = np.concatenate([keras.ops.convert_to_numpy(kernel) for kernel in bank.kernels])
    for i in range(4):
        for j in range(i):
            assert np.abs(kernels[i] - kernels[j]).max() > 0.1
    if isinstance(initializer, keras.initializers.Orthogonal):  # of each expert, not of the bank
        np.testing.assert_allclose(
            kernels @ kernels.transpose(0, 2, 1), np.tile(np.eye(4), (4, 1, 1)), atol=1e-5
        )


def test_a_seed_repeats_the_weights():
    def kernels():
        bank = FeedForwardExperts(3, 4, kernel_initializer=keras.initializers.HeNormal(seed=5))
        bank.build((None, 4))
        return bank.get_weights()

    for first, again in zip(kernels(), kernels(), strict=True):
        np.testing.assert_array_equal(first, again)


def test_gradients_of_idle_experts_are_dense_zeros():
    bank = FeedForwardExperts(3, 4, use_bias=True)
    with tf.GradientTape() as tape:
        y = bank(np.ones((2, 5), "float32"), tf.constant([0, 2, 0]))
    for gradient in tape.gradient(y, [w.value for w in bank.trainable_weights]):
        assert isinstance(gradient, tf.Tensor)
        np.testing.assert_array_equal(gradient[0], tf.zeros_like(gradient[0]))
        np.testing.assert_array_equal(gradient[2], tf.zeros_like(gradient[2]))


def test_regularizers_see_the_banks():
    bank = FeedForwardExperts(
        3, 4, use_bias=True, bias_initializer="ones", bias_regularizer=keras.regularizers.L1(0.5)
    )
    bank(np.ones((2, 5), "float32"), tf.constant([1, 1, 0]))
    # L1 of [3, 4] and of [3, 5] ones.
    np.testing.assert_allclose(bank.losses, [0.5 * 12, 0.5 * 15])


def test_config_round_trip():
    bank = FeedForwardExperts(3, (4, 6), 2, "gelu", True, "he_normal", "ones", "l2", "l1")
    clone = FeedForwardExperts.from_config(bank.get_config())
    assert clone.get_config() == bank.get_config()
    clone.build((None, 5))
    assert [tuple(k.shape) for k in clone.kernels] == [(3, 5, 4), (3, 4, 6), (3, 6, 2)]
    assert [tuple(b.shape) for b in clone.biases] == [(3, 4), (3, 6), (3, 2)]
    assert clone.compute_output_shape((None, 5)) == (None, 2)
