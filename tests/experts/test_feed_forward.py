"""The bank of feed-forward experts."""

import keras
import numpy as np
import pytest
from gradients import with_gradients
from helpers import (
    WIDTH,
    assert_agrees,
    examples,
    numpy,
    random_hierarchical,
    with_random_weights,
)
from reference_experts import GATED_ACTIVATIONS

from keras_moe import FeedForwardExperts, SparseMoE

pytestmark = pytest.mark.covering

MASK = np.random.default_rng(2).random(24) < 0.6


def test_rows_behind_the_last_expert_are_zeros():
    bank = FeedForwardExperts(3, 4, output_dim=2, use_bias=True, bias_initializer="ones")
    y = bank(np.ones((6, 5), "float32"), np.array([2, 0, 1]))
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
    "activation", [keras.layers.PReLU(), keras.layers.Dropout(0.5)], ids=lambda layer: layer.name
)
def test_an_activation_with_weights_or_a_seed_is_refused(activation):
    with pytest.raises(ValueError, match="weights or a seed.*experts=keras.Sequential"):
        FeedForwardExperts(2, 4, activation=activation).build((None, 3))


def test_a_layer_without_weights_is_an_activation():
    bank = FeedForwardExperts(1, 2, activation=keras.layers.LeakyReLU(negative_slope=0.5))
    rows = np.ones((1, 2), "float32")
    bank.build(rows.shape)
    bank.kernels[0].assign([[[1, -1], [1, -3]]])  # hidden units 2, -4: with the slope 2, -2
    bank.kernels[1].assign([[[1, 1], [1, 0]]])
    for given in ({"rows_per_expert": [1]}, {"experts": [0]}):
        np.testing.assert_array_equal(bank(rows, **given), [[0, 2]])


def test_each_half_of_a_gated_layer_is_drawn_with_its_own_fans():
    bank = FeedForwardExperts(50, [32, 32], activation="swiglu", kernel_initializer="glorot_normal")
    bank.build((None, 16))
    shapes = [tuple(kernel.shape) for kernel in bank.kernels]
    assert shapes == [(50, 16, 64), (50, 32, 64), (50, 32, 16)]
    # Glorot: the deviation is √(2 / (fan in + fan out)), of 16 and 32, 32 and 32, 32 and 16.
    for kernel, fans in zip(bank.kernels, (48, 64, 48), strict=True):
        kernel = keras.ops.convert_to_numpy(kernel)
        halves = np.split(kernel, 2, axis=-1) if kernel.shape[-1] == 64 else [kernel]
        for half in halves:
            np.testing.assert_allclose(
                half.std(axis=(1, 2)), np.full(50, (2 / fans) ** 0.5), rtol=0.15
            )


def test_halves_of_a_seeded_or_orthogonal_layer_are_two_matrices():
    initializer = keras.initializers.Orthogonal(seed=1)
    bank = FeedForwardExperts(2, 4, activation="glu", kernel_initializer=initializer)
    bank.build((None, 4))
    halves = np.concatenate(np.split(keras.ops.convert_to_numpy(bank.kernels[0]), 2, axis=-1))
    for i in range(4):
        np.testing.assert_allclose(halves[i] @ halves[i].T, np.eye(4), atol=1e-5)
        for j in range(i):
            assert np.abs(halves[i] - halves[j]).max() > 0.1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", sorted(GATED_ACTIVATIONS))
def test_gated_activations_agree_with_the_oracle(activation, training):
    layer = SparseMoE(5, [4, 3], k=2, activation=activation, use_bias=True, seed=7)
    # Products of products: smaller weights keep them at sizes that float32 can hold.
    assert_agrees(with_random_weights(layer, scale=0.5), examples(), training=training, mask=MASK)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("hierarchical", [True, False])
def test_shared_experts_agree_with_the_oracle(hierarchical, masked, training):
    options = {"num_shared_experts": 3, "use_bias": True, "seed": 7, "output_dim": 4}
    if hierarchical:
        layer = random_hierarchical(3, 2, 5, k=(2, 1), activation="tanh", **options)
    else:
        layer = with_random_weights(SparseMoE(5, 5, k=2, activation="geglu", **options))
    expected = assert_agrees(layer, examples(), training=training, mask=MASK if masked else None)
    if masked:
        np.testing.assert_array_equal(expected.y[~MASK], np.zeros((np.sum(~MASK), 4)))
    assert layer.shared_experts.kernels[0].shape[:2] == (3, WIDTH)


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
    bank.build((None, 5))

    def total(rows):
        return keras.ops.sum(bank(rows, rows_per_expert=[0, 2, 0])), ()

    _, _, gradients = with_gradients(total, [np.ones((2, 5), "float32")], bank.trainable_weights)
    for gradient in map(numpy, gradients):
        np.testing.assert_array_equal(gradient[[0, 2]], np.zeros_like(gradient[[0, 2]]))


def test_regularizers_see_the_banks():
    bank = FeedForwardExperts(
        3, 4, use_bias=True, bias_initializer="ones", bias_regularizer=keras.regularizers.L1(0.5)
    )
    bank(np.ones((2, 5), "float32"), np.array([1, 1, 0]))
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


def test_config_carries_what_came_later():
    options = {"activation": "swiglu", "recompute": True, "static_shapes": True}
    bank = FeedForwardExperts(3, 4, **options)
    assert options.items() <= bank.get_config().items()
    assert FeedForwardExperts.from_config(bank.get_config()).get_config() == bank.get_config()


@pytest.mark.parametrize("factor", [None, 1.0])
@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_regularizers_of_matrices_get_each_matrix(activation, factor):
    regularizer = keras.regularizers.OrthogonalRegularizer(0.1)
    layer = SparseMoE(
        3,
        4,
        k=2,
        activation=activation,
        use_bias=True,
        kernel_regularizer=regularizer,
        bias_regularizer=lambda bias: keras.ops.max(bias) + len(bias.shape),
        capacity_factor=factor,
    )
    with_random_weights(layer)
    matrices, biases = [], []
    for i, (kernel, bias) in enumerate(
        zip(layer.experts.kernels, layer.experts.biases, strict=True)
    ):
        # A gated hidden layer has two matrices side by side.
        halves = 2 if activation == "swiglu" and i == 0 else 1
        matrices.append(sum(regularizer(m) for k in numpy(kernel) for m in np.split(k, halves, 1)))
        biases.append(sum(b.max() + 1 for v in numpy(bias) for b in np.split(v, halves)))
    *_, first, first_bias, last, last_bias = layer.losses
    np.testing.assert_allclose([first, last], matrices, rtol=1e-5)
    np.testing.assert_allclose([first_bias, last_bias], biases, rtol=1e-5)
    model = keras.Sequential([keras.Input((WIDTH,)), layer])
    model.compile("sgd", "mse", jit_compile=factor is not None or keras.config.backend() == "jax")
    before = numpy(layer.experts.kernels[1]).copy()
    model.fit(np.zeros((8, WIDTH)), np.zeros((8, WIDTH)), verbose=0)
    # Rows of zeros have no gradient of their own, so that what moves the kernels is this.
    assert np.any(numpy(layer.experts.kernels[1]) != before)


def test_l2_of_a_bank_is_that_of_all_its_entries():
    bank = FeedForwardExperts(3, 4, kernel_regularizer=keras.regularizers.L2(0.5))
    bank.build((None, WIDTH))
    expected = [0.5 * np.square(numpy(kernel)).sum() for kernel in bank.kernels]
    np.testing.assert_allclose(bank.losses, expected, rtol=1e-6)
