"""HierarchicalMoE: its numbers against the oracle, and what it costs."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers import (
    CROSS_ENTROPY,
    WIDTH,
    assert_keeps_no_state,
    assign_random_weights,
    next_words,
)
from keras.ops import convert_to_numpy as numpy
from reference_hierarchical import hierarchical_moe

from keras_moe import (
    FeedForwardExperts,
    HierarchicalGating,
    HierarchicalMoE,
    NoisyTopKGating,
    Routing,
    SparseMoE,
)

EXAMPLES, HIDDEN = 24, 5
KERNELS = ("primary", "secondary", "primary_noise", "secondary_noise")


def examples(seed=0):
    return np.random.default_rng(seed).normal(size=(EXAMPLES, WIDTH)).astype("float32")


def random_layer(*args, **kwargs):
    layer = HierarchicalMoE(*args, **kwargs)
    layer.build((None, WIDTH))
    assign_random_weights(layer, np.random.default_rng(0))
    return layer


def oracle(layer, x, *, training, upstream, mask):
    """The oracle's answer for the layer's weights and the first noise that it will draw."""
    gating, normals = layer.gating, None
    if training and gating.noise:
        generator = keras.random.SeedGenerator(gating.seed)
        shapes = (
            (len(x), gating.num_groups),
            (len(x), gating.k[0], gating.experts_per_group),
        )
        normals = [numpy(keras.random.normal(shape, seed=generator)) for shape in shapes]
    return hierarchical_moe(
        x,
        [numpy(kernel) for kernel in layer.experts.kernels],
        [numpy(bias) for bias in layer.experts.biases] or None,
        **{name: numpy(getattr(gating, name)) for name in KERNELS if hasattr(gating, name)},
        normals=normals,
        k=gating.k,
        mask=mask,
        activation=layer.experts.activation.__name__,
        importance_loss_weight=layer.importance_loss_weight,
        load_loss_weight=layer.load_loss_weight,
        upstream=upstream,
    )


def assert_agrees(layer, x, *, training, mask=None):
    """Compares all that the layer gives, and all gradients; returns the oracle's answer."""
    rng = np.random.default_rng(1)
    upstream = rng.normal(size=layer.compute_output_shape(x.shape)).astype("float32")
    expected = oracle(layer, x, training=training, upstream=upstream, mask=mask)
    again = HierarchicalMoE.from_config(layer.get_config())  # which draws the same noise once more
    again.build(x.shape)
    again.set_weights(layer.get_weights())

    routing = again.route(x, training=training, mask=mask)
    rows = slice(None) if mask is None else mask
    np.testing.assert_array_equal(numpy(routing.expert_index)[rows], expected.expert_index[rows])
    np.testing.assert_allclose(routing.gates, expected.gates, rtol=1e-5, atol=1e-6)
    for name in ("importance", "load"):
        wanted = getattr(expected, name).ravel()
        np.testing.assert_allclose(getattr(routing, name), wanted, rtol=1e-5, atol=1e-5)

    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=training, mask=mask)
        total = tf.reduce_sum(y * upstream) + tf.add_n(layer.losses)
    np.testing.assert_allclose(y, expected.y, rtol=1e-5, atol=1e-5)
    wanted = [expected.importance_loss, expected.load_loss]
    np.testing.assert_allclose(layer.losses, wanted, rtol=1e-5, atol=1e-6)

    sources = {"x": x, "kernels": layer.experts.kernels, "biases": layer.experts.biases}
    sources |= {name: getattr(layer.gating, name, []) for name in KERNELS}
    sources = keras.tree.map_structure(lambda v: getattr(v, "value", v), sources)
    for name, received in tape.gradient(total, sources).items():
        if isinstance(received, list) and not received:
            continue  # A weight that the layer does without.
        theirs = keras.tree.flatten(expected.gradients[name])
        for ours, gradient in zip(keras.tree.flatten(received), theirs, strict=True):
            if ours is None:  # The noise kernels have no part in a call without noise.
                assert name.endswith("noise") and not training
                ours = np.zeros_like(gradient)
            assert not isinstance(ours, tf.IndexedSlices)
            np.testing.assert_allclose(ours, gradient, rtol=1e-4, atol=1e-4, err_msg=name)
    return expected


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("groups", "group_size", "k"),
    [
        (1, 1, (1, 1)),
        (1, 5, (1, 2)),
        (5, 1, (2, 1)),
        (2, 3, (1, 1)),
        (3, 4, (2, 2)),
        (3, 4, (1, 3)),
        (3, 4, (3, 2)),  # every group: the load of the first level is counted
        (3, 4, (2, 4)),  # every expert of a group: that of the second level
        (3, 4, (3, 4)),
        (8, 8, (2, 2)),
        (40, 2, (1, 1)),  # more groups than examples
    ],
)
def test_agrees_with_the_oracle(groups, group_size, k, training):
    layer = random_layer(groups, group_size, HIDDEN, k=k, output_dim=4, seed=7)
    expected = assert_agrees(layer, examples(), training=training)
    if groups > EXAMPLES:
        assert not expected.load.any(axis=1).all()


@pytest.mark.parametrize("k", [(2, 2), (1, 1)])
def test_without_noise_agrees_with_the_oracle(k):
    layer = random_layer(3, 4, HIDDEN, gating=HierarchicalGating(3, 4, k, noise=False))
    assert len(layer.gating.weights) == 2
    assert_agrees(layer, examples(), training=True)


@pytest.mark.parametrize("training", [True, False])
def test_biases_deep_experts_and_a_mask_agree_with_the_oracle(training):
    layer = random_layer(3, 4, [5, 4], use_bias=True, activation="tanh", seed=11)
    mask = np.random.default_rng(2).random(EXAMPLES) < 0.6
    assert_agrees(layer, examples(), training=training, mask=mask)


@pytest.mark.parametrize("training", [True, False])
def test_uneven_and_empty_groups_agree_with_the_oracle(training):
    layer = random_layer(4, 3, HIDDEN, k=(2, 2), seed=5)
    x = examples()
    x[:, 0] = 1.0
    # This feature keeps every example away from group 0, and pulls most to group 2.
    primary = numpy(layer.gating.primary).copy()
    primary[0] = [-40.0, 0.0, 3.0, 1.0]
    layer.gating.primary.assign(primary)
    expected = assert_agrees(layer, x, training=training)
    group = expected.expert_index[:, ::2] // 3
    rows_per_group = np.bincount(group.ravel(), minlength=4)
    assert rows_per_group[0] == 0
    assert 0 < rows_per_group[1] < rows_per_group[3] < rows_per_group[2]
    np.testing.assert_array_equal(expected.load[0], np.zeros(3))


class FixedGating(keras.layers.Layer):
    """A flat gating over all experts, whose gates were worked out beforehand."""

    def __init__(self, gates):
        super().__init__()
        self.gates = gates

    def call(self, x, training=None, mask=None):
        everyone = np.broadcast_to(np.arange(self.gates.shape[1], dtype="int32"), self.gates.shape)
        importance = tf.reduce_sum(self.gates, axis=0)
        return Routing(tf.constant(everyone), tf.constant(self.gates), importance, importance)


def softmax_of_top(logits, k):
    """Noiseless gates [..., N] of equations 3 to 5, for k > 1."""
    kept = np.where(logits >= np.sort(logits)[..., -k, None], logits, -np.inf)
    weights = np.exp(kept - kept.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def test_equals_the_flat_mixture_whose_gates_are_the_products():
    layer, x = random_layer(4, 5, HIDDEN, k=(2, 3)), examples()
    primary = softmax_of_top(x @ numpy(layer.gating.primary), 2)
    secondary = softmax_of_top(np.einsum("td,adb->tab", x, numpy(layer.gating.secondary)), 3)
    products = np.reshape(primary[:, :, None] * secondary, (EXAMPLES, 20))
    assert (np.count_nonzero(products, axis=1) == 6).all()
    flat = SparseMoE(20, HIDDEN, gating=FixedGating(products))
    flat.build(x.shape)
    flat.experts.set_weights(layer.experts.get_weights())
    np.testing.assert_allclose(layer(x), flat(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layer.losses[0], flat.losses[0], rtol=1e-5)


@pytest.mark.parametrize("groups", [1, 7])
def test_one_group_or_groups_of_one_equal_the_flat_layer(groups):
    sizes, k = ((1, 7), (1, 3)) if groups == 1 else ((7, 1), (3, 1))
    layer, x = random_layer(*sizes, HIDDEN, k=k), examples()
    flat = SparseMoE(7, HIDDEN, k=3)
    flat.build(x.shape)
    kernel = layer.gating.secondary[0] if groups == 1 else layer.gating.primary
    flat.gating.gate_kernel.assign(kernel)
    flat.experts.set_weights(layer.experts.get_weights())
    # The only choice of a level has the gate 1.
    np.testing.assert_allclose(layer(x), flat(x), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(layer.route(x), flat.route(x), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_gating_multiplies_each_example_with_its_own_groups_alone(training, monkeypatch):
    products = []
    matmul = keras.ops.matmul

    def recording_matmul(a, b):
        products.append((tuple(a.shape), tuple(b.shape)))
        return matmul(a, b)

    gating = HierarchicalGating(32, 16, k=(3, 2))
    gating.build((None, WIDTH))
    assign_random_weights(gating, np.random.default_rng(0))
    mask = np.arange(EXAMPLES) < 20
    monkeypatch.setattr("keras_moe.hierarchical_moe.ops.matmul", recording_matmul)
    gating(examples(), training=training, mask=mask)
    multiplications = sum(rows * width * columns for (rows, width), (_, columns) in products)
    # Every example with the groups, and the 20 that count with the 16 experts of 3 groups, not of
    # 32. In training that twice: for the noise too.
    once = EXAMPLES * WIDTH * 32 + 20 * 3 * WIDTH * 16
    assert multiplications == once * (2 if training else 1)


def test_secondary_kernels_of_other_groups_are_never_met():
    layer, x = random_layer(16, 4, HIDDEN, k=(2, 2), seed=3), examples()[:4]
    sound = layer(x)
    chosen = np.unique(numpy(layer.route(x).expert_index) // 4)
    assert len(chosen) <= 8
    poisoned = np.full((16, WIDTH, 4), np.nan)
    poisoned[chosen] = numpy(layer.gating.secondary)[chosen]
    layer.gating.secondary.assign(poisoned)
    tensors = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        y = layer(tensors)
        total = tf.reduce_sum(y) + tf.add_n(layer.losses)
    np.testing.assert_array_equal(y, sound)
    for gradient in tape.gradient(total, [tensors, layer.gating.secondary.value]):
        assert np.isfinite(gradient).all()


def test_load_of_evaluation_is_the_rows_that_each_expert_computes():
    rows_computed = []

    def recording_relu(z):
        rows_computed.append(len(z))
        return keras.ops.relu(z)

    layer = random_layer(5, 4, 8, k=(2, 3), activation=recording_relu)
    mask = np.arange(EXAMPLES) < 17
    layer(examples(), mask=mask)
    np.testing.assert_array_equal(layer.route(examples(), mask=mask).load, rows_computed)
    assert sum(rows_computed) == 17 * 2 * 3


def test_a_gate_too_small_for_float32_is_no_row():
    layer, x = random_layer(3, 4, HIDDEN, k=(2, 2)), np.ones((4, WIDTH), "float32")
    # Margins of thousands: the second choice of the first level has the gate exp(-1000s) = 0.
    layer.gating.primary.assign(np.tile([-1000.0, 1000.0, 0.0], (WIDTH, 1)))
    routing = layer.route(x)
    np.testing.assert_allclose(np.sum(routing.gates, axis=1), np.ones(4), rtol=1e-6)
    assert set(numpy(routing.load)) == {0, 4} and np.sum(routing.load) == 4 * 2
    np.testing.assert_array_equal(numpy(routing.load)[:4], np.zeros(4))
    assert np.isfinite(layer(x)).all()


def test_gates_of_k_1_are_probabilities_that_learn():
    gating = HierarchicalGating(2, 3, k=(1, 1))
    gating.build((None, 1))
    gating.primary.assign(np.log([[1.0, 3.0]]))
    gating.secondary.assign(np.log([[[1.0, 1.0, 1.0]], [[1.0, 5.0, 4.0]]]))
    with tf.GradientTape() as tape:
        routing = gating(np.ones((1, 1)))
        gate = routing.gates[0, 0]
    np.testing.assert_array_equal(routing.expert_index, [[4]])  # 1·3 + 1
    np.testing.assert_allclose(gate, 3 / 4 * 1 / 2, rtol=1e-6)
    d_primary, d_secondary = tape.gradient(gate, [gating.primary.value, gating.secondary.value])
    # Softmax: p_1·(1 - p_1) for itself, -p_1·p_j for the others; times the gate of the other level.
    np.testing.assert_allclose(d_primary, [[-3 / 16 / 2, 3 / 16 / 2]], rtol=1e-5)
    expected = np.array([[[0, 0, 0]], [[-0.05, 0.25, -0.2]]]) * 3 / 4
    np.testing.assert_allclose(d_secondary, expected, rtol=1e-5)


def test_ties_go_to_the_lowest_index():
    routing = HierarchicalMoE(4, 5, 3, k=(2, 3)).route(np.ones((2, WIDTH), "float32"))
    np.testing.assert_array_equal(routing.expert_index, [[0, 1, 2, 5, 6, 7]] * 2)
    np.testing.assert_allclose(routing.gates, np.full((2, 6), 1 / 6), rtol=1e-6)


def test_the_noise_repeats_with_the_seed_and_reaches_every_expert():
    x = np.ones((4096, WIDTH), "float32")
    first, again, other = (
        HierarchicalMoE(4, 4, 3, k=(1, 1), seed=seed).route(x, training=True) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.expert_index, again.expert_index)
    assert np.any(first.expert_index != other.expert_index)
    # Without signal each of the 16 experts has the chance 1/16: 256 examples, with a deviation of
    # √(4096 · 1/16 · 15/16) = 15.5. Were the levels to share their noise, 12 would have none.
    rows = np.bincount(numpy(first.expert_index).ravel(), minlength=16)
    np.testing.assert_allclose(rows, np.full(16, 256), atol=5 * 15.5)
    np.testing.assert_allclose(first.load, np.full(16, 256), rtol=0.1)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float64"])
def test_gating_is_float32_under_every_policy(policy):
    layer = HierarchicalMoE(3, 4, 8, dtype=policy)
    y = layer(np.ones((2, 3, WIDTH)), training=True)
    assert y.dtype == keras.DTypePolicy(policy).compute_dtype
    assert {w.dtype for w in layer.gating.trainable_weights} == {"float32"}
    assert layer.route(np.ones((2, 3, WIDTH))).gates.dtype == tf.float32


def language_model(**kwargs):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.layers.Embedding(50, 8, mask_zero=True),
            HierarchicalMoE(4, 3, 16, name="moe", **kwargs),
            keras.layers.Dense(50),
        ]
    )


@pytest.fixture(scope="module")
def trained():
    model, (x, y) = language_model(), next_words()
    model.compile(keras.optimizers.Adam(0.03), CROSS_ENTROPY)
    model.fit(x, y, batch_size=16, verbose=0)
    return model


@pytest.mark.parametrize(("k", "epochs"), [((2, 2), 8), ((1, 1), 16)])
def test_fit_learns(k, epochs):
    model, (x, y) = language_model(k=k), next_words()
    model.compile(keras.optimizers.Adam(0.03), CROSS_ENTROPY)
    # With k = 1 twice the gates begin at 1/12, and the outputs as small: that takes longer.
    history = model.fit(x, y, batch_size=16, epochs=epochs, verbose=0).history
    assert history["loss"][-1] < 0.6 * history["loss"][0]
    assert np.isfinite(history["moe/cv_load"]).all()
    for name in KERNELS:
        assert np.any(getattr(model.layers[1].gating, name)), f"{name} has not moved"


def test_saved_model_weights_and_clone_come_back(trained, tmp_path):
    x, _ = next_words()
    expected = trained.predict(x, verbose=0)
    trained.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), expected)
    assert loaded.layers[1].get_config() == trained.layers[1].get_config()

    trained.save_weights(tmp_path / "model.weights.h5")
    clone = keras.models.clone_model(trained)
    clone.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(clone.predict(x, verbose=0), expected)


def test_export_writes_no_state(trained, tmp_path):
    x, _ = next_words()
    trained.export(tmp_path / "1", verbose=False)
    served = tf.saved_model.load(tmp_path / "1")
    np.testing.assert_allclose(
        served.serve(tf.constant(x, "float32")), trained.predict(x, verbose=0), rtol=1e-5, atol=1e-6
    )
    assert_keeps_no_state(served)


@pytest.mark.parametrize(
    "parts",
    [
        {"hidden_units": [4, 3], "k": [1, 2], "use_bias": True, "seed": 4},
        {
            "experts": FeedForwardExperts(6, 4),
            "gating": HierarchicalGating(2, 3, (1, 3), noise=False, noise_epsilon=0.1, seed=9),
        },
        {"hidden_units": 4, "gating": NoisyTopKGating(6, k=2)},
    ],
    ids=["defaults", "hierarchical", "flat"],
)
def test_config_round_trip(parts):
    layer = HierarchicalMoE(2, 3, **parts)
    y = layer(examples())
    clone = HierarchicalMoE.from_config(layer.get_config())
    clone.build((None, WIDTH))
    clone.set_weights(layer.get_weights())
    np.testing.assert_array_equal(clone(examples()), y)
    assert clone.get_config() == layer.get_config()
    assert type(clone.gating) is type(layer.gating)
    assert clone.gating.get_config() == layer.gating.get_config()


def test_kernels_begin_at_zero_and_have_the_documented_shapes():
    layer = HierarchicalMoE(3, 4, 8, output_dim=2)
    layer.build((None, 5))
    shapes = {name: tuple(getattr(layer.gating, name).shape) for name in KERNELS}
    assert shapes == {
        "primary": (5, 3),
        "secondary": (3, 5, 4),
        "primary_noise": (5, 3),
        "secondary_noise": (3, 5, 4),
    }
    assert not any(np.any(weight) for weight in layer.gating.trainable_weights)
    assert [tuple(kernel.shape) for kernel in layer.experts.kernels] == [(12, 5, 8), (12, 8, 2)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": (4, 2)}, r"k=\(4, 2\), num_groups=3, experts_per_group=4"),
        ({"k": (2, 5)}, r"k=\(2, 5\), num_groups=3, experts_per_group=4"),
        ({"k": (0, 2)}, r"k=\(0, 2\), num_groups=3"),
        ({"k": 2}, "`k` must be a pair of integers.*Received: 2"),
        ({"k": (2,)}, r"pair of integers.*Received: \(2,\)"),
        ({"k": (2.0, 2)}, r"pair of integers.*Received: \(2.0, 2\)"),
        ({"num_groups": 0}, "`num_groups` must be .* Received: 0"),
        ({"experts_per_group": -1}, "`experts_per_group` must be .* Received: -1"),
        ({"gating": "softmax"}, "`gating` must be .*Received: 'softmax'"),
        ({"gating": HierarchicalGating(4, 3)}, "`num_groups=3`.* made for 4"),
        ({"gating": NoisyTopKGating(8)}, "`num_experts=12`.* made for 8"),
        ({"hidden_units": None}, "either `hidden_units`"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        HierarchicalMoE(**{"num_groups": 3, "experts_per_group": 4, "hidden_units": 8, **arguments})


def test_a_noise_epsilon_of_zero_is_refused():
    with pytest.raises(ValueError, match="above 0. Received: 0.0"):
        HierarchicalGating(3, 4, noise_epsilon=0.0)


def test_wrong_inputs_are_refused():
    with pytest.raises(ValueError, match="HierarchicalMoE takes inputs of rank 2 to 4"):
        HierarchicalMoE(3, 4, 8)(keras.KerasTensor((3,)))
