"""SparseMoE: its numbers against the oracle, and its manners as a Keras layer."""

import hypothesis
import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from hypothesis import strategies as st
from keras.ops import convert_to_numpy as numpy

import keras_moe
from keras_moe import SparseMoE
from keras_moe.routing import check_routing

EXAMPLES, WIDTH, HIDDEN = 24, 6, 5


def assign_random_weights(layer, rng):
    """Weights far from zero: initial gating kernels are zeros, which would test ties alone."""
    assert layer.built
    for weight in layer.weights:
        weight.assign(rng.normal(size=weight.shape))


def oracle(layer, x, *, training, upstream=None, mask=None):
    """The oracle's answer for the layer's weights and the first noise that it will draw."""
    noisy = training and isinstance(layer.gating, keras_moe.NoisyTopKGating)
    normals = None
    if noisy:
        generator = keras.random.SeedGenerator(layer.seed)
        normals = np.array(keras.random.normal((len(x), layer.num_experts), seed=generator))
    softmax = isinstance(layer.gating, keras_moe.SoftmaxGating)
    return reference.sparse_moe(
        x,
        [numpy(kernel) for kernel in layer.experts.kernels],
        [numpy(bias) for bias in layer.experts.biases] or None,
        gate_kernel=numpy(layer.gating.gate_kernel),
        noise_kernel=None if softmax else numpy(layer.gating.noise_kernel),
        normals=normals,
        k=None if softmax else layer.k,
        gating="softmax" if softmax else "noisy_top_k",
        mask=mask,
        activation=layer.experts.activation.__name__,
        importance_loss_weight=layer.importance_loss_weight,
        load_loss_weight=layer.load_loss_weight,
        upstream=upstream,
    )


def gradients(layer, x, upstream, *, training, mask=None):
    """Output, losses, and the gradients that the oracle gives, under its names."""
    x = tf.constant(x, "float32")
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=training, mask=mask)
        total = tf.reduce_sum(tf.cast(y, tf.float32) * upstream) + tf.add_n(layer.losses)
    wanted = {"x": x, "kernels": layer.experts.kernels, "biases": layer.experts.biases}
    for name in ("gate_kernel", "noise_kernel"):
        wanted[name] = getattr(layer.gating, name, [])
    values = keras.tree.map_structure(lambda v: getattr(v, "value", v), wanted)
    return y, list(layer.losses), tape.gradient(total, values)


def assert_agrees(layer, x, *, training, mask=None, seed=0):
    upstream = np.random.default_rng(seed).normal(size=(len(x), layer(x).shape[-1]))
    layer_again = SparseMoE.from_config(layer.get_config())  # whose noise is not drawn yet
    layer_again.build(x.shape)
    layer_again.set_weights(layer.get_weights())
    expected = oracle(layer, x, training=training, upstream=upstream, mask=mask)
    y, losses, received = gradients(layer_again, x, upstream, training=training, mask=mask)
    np.testing.assert_allclose(y, expected.y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        losses, [expected.importance_loss, expected.load_loss], rtol=1e-5, atol=1e-6
    )
    for name, gradient in received.items():
        if isinstance(gradient, list) and not gradient:
            continue  # A weight that the layer does without.
        scale = max(1.0, *(np.abs(g).max() for g in keras.tree.flatten(expected.gradients[name])))
        for ours, theirs in zip(
            keras.tree.flatten(gradient), keras.tree.flatten(expected.gradients[name]), strict=True
        ):
            if ours is None:  # The noise kernel has no part in a call without noise.
                assert name == "noise_kernel" and not training
                ours = np.zeros_like(theirs)
            assert not isinstance(ours, tf.IndexedSlices)
            np.testing.assert_allclose(
                ours / scale, theirs / scale, rtol=1e-4, atol=1e-4, err_msg=name
            )


def sizes():
    return sorted({(n, k) for n in (1, 2, 7, 64) for k in (1, 2, 4, n) if k <= n})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("num_experts", "k"), sizes())
def test_noisy_top_k_agrees_with_the_oracle(num_experts, k, training):
    rng = np.random.default_rng(num_experts * 100 + k)
    layer = SparseMoE(num_experts, HIDDEN, k=k, output_dim=4, seed=7)
    x = rng.normal(size=(EXAMPLES, WIDTH)).astype("float32")
    layer.build(x.shape)
    assign_random_weights(layer, rng)
    assert_agrees(layer, x, training=training)


@pytest.mark.parametrize("num_experts", [1, 2, 7, 64])
def test_softmax_gating_agrees_with_the_oracle(num_experts):
    rng = np.random.default_rng(num_experts)
    layer = SparseMoE(num_experts, HIDDEN, gating="softmax")
    x = rng.normal(size=(EXAMPLES, WIDTH)).astype("float32")
    layer.build(x.shape)
    assign_random_weights(layer, rng)
    assert_agrees(layer, x, training=True)


@pytest.mark.parametrize("training", [True, False])
def test_biases_deep_experts_and_a_mask_agree_with_the_oracle(training):
    rng = np.random.default_rng(3)
    layer = SparseMoE(7, [5, 4], k=2, use_bias=True, activation="tanh", seed=11)
    x = rng.normal(size=(EXAMPLES, WIDTH)).astype("float32")
    layer.build(x.shape)
    assign_random_weights(layer, rng)
    assert_agrees(layer, x, training=training, mask=rng.random(EXAMPLES) < 0.6)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(data=st.data())
def test_any_shape_agrees_with_the_oracle(data):
    num_experts = data.draw(st.integers(1, 9), label="num_experts")
    k = data.draw(st.integers(1, num_experts), label="k")
    leading = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3), label="leading")
    width = data.draw(st.integers(1, 5), label="width")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31), label="seed"))
    x = rng.normal(size=(*leading, width)).astype("float32")
    mask = rng.random(leading) < 0.7 if data.draw(st.booleans(), label="masked") else None
    layer = SparseMoE(num_experts, 3, k=k)
    layer.build(x.shape)
    assign_random_weights(layer, rng)
    y = layer(x, mask=mask)
    flat_mask = None if mask is None else mask.reshape(-1)
    expected = oracle(layer, x.reshape(-1, width), training=False, mask=flat_mask)
    assert y.shape == x.shape
    np.testing.assert_allclose(np.reshape(y, [-1, width]), expected.y, rtol=1e-4, atol=1e-5)
    routing = layer.route(x, mask=mask)
    np.testing.assert_allclose(routing.load, expected.load)
    np.testing.assert_allclose(routing.importance, expected.importance, rtol=1e-5, atol=1e-6)


def test_an_expert_computes_only_the_rows_routed_to_it():
    rows_computed = []

    def recording_relu(z):
        rows_computed.append(len(z))
        return keras.ops.relu(z)

    layer = SparseMoE(16, 8, k=3, activation=recording_relu)
    x = np.random.default_rng(0).normal(size=(5, 10, WIDTH))
    mask = np.arange(50).reshape(5, 10) < 37
    layer.build(x.shape)
    assign_random_weights(layer, np.random.default_rng(1))
    layer(x, mask=mask)
    load = layer.route(x, mask=mask).load
    assert rows_computed == list(load)
    assert sum(rows_computed) == 37 * 3  # each example that isn't masked, once per choice


def test_ties_go_to_the_lowest_index():
    layer = SparseMoE(8, 4, k=3)
    routing = layer.route(np.ones((2, WIDTH), "float32"))  # zero kernels: all logits are equal
    np.testing.assert_array_equal(routing.expert_index, [[0, 1, 2]] * 2)
    np.testing.assert_allclose(routing.gates, np.full((2, 3), 1 / 3))


def test_the_noise_repeats_with_the_seed_and_spreads_the_load():
    x = np.ones((512, WIDTH), "float32")
    first, again, other = (
        SparseMoE(8, 4, k=2, seed=seed).route(x, training=True) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.expert_index, again.expert_index)
    assert np.any(first.expert_index != other.expert_index)
    # Without signal every expert has the same chance, K/N of 512 examples; the estimate of it is
    # the same for all but for the noise of the thresholds.
    np.testing.assert_allclose(first.load, np.full(8, 512 * 2 / 8), rtol=0.1)


def test_losses_are_importance_then_load_then_others():
    layer = SparseMoE(4, 3, k=1, kernel_regularizer="l2", load_loss_weight=0.5)
    x = np.ones((10, WIDTH), "float32")
    layer(x)
    # All to expert 0, whose gate is 1/4: CV² of [2.5, 0, 0, 0] and of [10, 0, 0, 0] is N - 1 = 3.
    importance_loss, load_loss, *regularization = layer.losses
    np.testing.assert_allclose(importance_loss, 0.1 * 3, rtol=1e-6)
    np.testing.assert_allclose(load_loss, 0.5 * 3, rtol=1e-6)
    expected = [0.01 * np.square(numpy(kernel)).sum() for kernel in layer.experts.kernels]
    np.testing.assert_allclose(regularization, expected, rtol=1e-5)


def test_a_single_expert_equals_the_bare_expert():
    layer = SparseMoE(1, HIDDEN, k=1)
    x = np.random.default_rng(0).normal(size=(9, WIDTH)).astype("float32")
    y = layer(x, training=True)
    up, down = (numpy(kernel)[0] for kernel in layer.experts.kernels)
    np.testing.assert_allclose(y, np.maximum(x @ up, 0) @ down, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(layer.losses, [0, 0])


@pytest.mark.parametrize("mask", [None, np.zeros((3, 0), bool)])
def test_zero_examples(mask):
    layer = SparseMoE(4, 3, k=2)
    x = tf.zeros((3, 0, WIDTH))
    with tf.GradientTape() as tape:
        y = layer(x, training=True, mask=mask)
        total = tf.reduce_sum(y) + tf.add_n(layer.losses)
    assert y.shape == (3, 0, WIDTH)
    np.testing.assert_array_equal(layer.losses, [0, 0])
    for gradient in tape.gradient(total, [w.value for w in layer.trainable_weights]):
        np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))


def test_masked_nan_reaches_neither_outputs_nor_gradients():
    x = np.random.default_rng(0).normal(size=(6, WIDTH)).astype("float32")
    x[[1, 4]] = np.nan
    layer = SparseMoE(4, HIDDEN, k=2)
    y, losses, received = gradients(layer, x, 1.0, training=True, mask=~np.isnan(x[:, 0]))
    np.testing.assert_array_equal(np.array(y)[[1, 4]], np.zeros((2, WIDTH)))
    for array in (y, *losses, *keras.tree.flatten(received)):
        assert np.isfinite(array).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_broken_example_stays_in_its_own_row(value, training):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, WIDTH)).astype("float32")
    layer = SparseMoE(5, HIDDEN, k=2, seed=3)
    layer.build(x.shape)
    assign_random_weights(layer, rng)
    y_sound = np.array(layer(x, training=False))
    x[3, 2] = value
    y = np.array(layer(x, training=training))
    assert not np.isfinite(y[3]).all()
    assert np.isfinite(np.delete(y, 3, axis=0)).all()
    assert np.isfinite(layer.losses).all()
    if not training:
        np.testing.assert_allclose(
            np.delete(y, 3, axis=0), np.delete(y_sound, 3, axis=0), rtol=1e-5, atol=1e-6
        )


def language_model(policy=None, **kwargs):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.layers.Embedding(50, 8, mask_zero=True, dtype=policy),
            SparseMoE(8, 16, k=2, name="moe", dtype=policy, **kwargs),
            keras.layers.Dense(50, dtype=policy),
        ]
    )


def next_words(batch=32, length=10):
    """Sequences that count upwards, of unequal length, padded with 0."""
    rng = np.random.default_rng(0)
    start = rng.integers(1, 20, size=(batch, 1))
    x = start + np.arange(length)
    x[np.arange(length) >= rng.integers(3, length, size=(batch, 1))] = 0
    return x, np.where(x > 0, x + 1, 0)


CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@pytest.mark.parametrize(
    "compile_options", [{}, {"run_eagerly": True}, {"steps_per_execution": 2}], ids=str
)
@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16", "float64"])
def test_fit_learns_under_every_policy(policy, compile_options):
    model = language_model(policy)
    model.compile(keras.optimizers.Adam(0.03), CROSS_ENTROPY, **compile_options)
    x, y = next_words()
    history = model.fit(x, y, batch_size=16, epochs=8, verbose=0).history
    assert history["loss"][-1] < 0.6 * history["loss"][0]
    assert model.layers[1].gating.gate_kernel.dtype == "float32"
    assert model.layers[1](np.ones((2, 3, 8))).dtype == keras.DTypePolicy(policy).compute_dtype


def test_jit_compile_auto_does_not_try_xla():
    model = language_model()
    model.compile("adam", CROSS_ENTROPY)
    assert not model.jit_compile
    assert not model.layers[1].supports_jit


def test_unknown_time_dimension_does_not_retrace():
    inputs = keras.Input((None, WIDTH))
    layer = SparseMoE(4, 8, k=2)
    outputs = layer(inputs)
    assert outputs.shape == (None, None, WIDTH)
    model = keras.Model(inputs, outputs)
    traces = []

    @tf.function(input_signature=[tf.TensorSpec((None, None, WIDTH))])
    def call(x):
        traces.append(1)
        return model(x)

    for length in (1, 5, 3):
        assert call(tf.ones((2, length, WIDTH))).shape == (2, length, WIDTH)
    assert len(traces) == 1


@pytest.mark.parametrize("leading", [(6,), (2, 3), (2, 1, 3)])
def test_rank_does_not_change_the_result(leading):
    x = np.random.default_rng(0).normal(size=(6, WIDTH)).astype("float32")
    keras.utils.set_random_seed(0)
    layer = SparseMoE(4, 8, k=2, output_dim=3)
    mask = np.array([1, 1, 0, 1, 1, 1], bool)
    y = layer(x.reshape(*leading, WIDTH), mask=mask.reshape(leading))
    assert y.shape == layer.compute_output_shape((*leading, WIDTH)) == (*leading, 3)
    keras.utils.set_random_seed(0)
    flat = SparseMoE(4, 8, k=2, output_dim=3)(x, mask=mask)
    np.testing.assert_array_equal(np.reshape(y, (6, 3)), flat)


def test_the_mask_travels_through_the_layer():
    model = language_model()
    x, _ = next_words()
    hidden = model.layers[1](model.layers[0](x))
    np.testing.assert_array_equal(keras.src.backend.get_keras_mask(hidden), x > 0)
    assert not np.any(np.array(hidden)[x == 0])


def test_balance_shows_in_the_logs():
    model = language_model(seed=5)
    model.build((None, None))
    model.compile("sgd", CROSS_ENTROPY)
    x, y = next_words()
    assign_random_weights(model.layers[1], np.random.default_rng(0))
    logs = model.evaluate(x, y, batch_size=16, verbose=0, return_dict=True)
    embedded = np.array(model.layers[0](x))
    halves = [
        model.layers[1].route(embedded[rows], mask=x[rows] > 0)
        for rows in (slice(0, 16), slice(16, 32))
    ]

    def coefficient_of_variation(v):
        return np.std(v) / np.mean(v)

    for name, expected in {
        "moe/cv_importance": [coefficient_of_variation(r.importance) for r in halves],
        "moe/cv_load": [coefficient_of_variation(r.load) for r in halves],
        "moe/max_over_mean_load": [np.max(r.load) / np.mean(r.load) for r in halves],
    }.items():
        np.testing.assert_allclose(logs[name], np.mean(expected), rtol=1e-5)
    fitted = model.fit(x, y, validation_data=(x, y), verbose=0).history
    assert {"moe/cv_load", "val_moe/cv_load"} <= fitted.keys()


def test_balance_losses_are_part_of_the_loss():
    x, y = next_words()
    losses = []
    for weight in (0.0, 0.1):
        model = language_model(importance_loss_weight=weight, load_loss_weight=0.0)
        model.compile("sgd", CROSS_ENTROPY)
        losses.append(model.evaluate(x, y, verbose=0)[0])
    # Zero kernels: experts 0 and 1 of 8 share all examples, CV² = 8/2 - 1 = 3.
    np.testing.assert_allclose(losses[1] - losses[0], 0.1 * 3, rtol=1e-4)


def test_saved_model_and_weights_come_back(tmp_path):
    x, y = next_words()
    model = language_model()
    model.compile("adam", CROSS_ENTROPY)
    model.fit(x, y, verbose=0)
    expected = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), expected)
    assert loaded.layers[1].get_config() == model.layers[1].get_config()

    model.save_weights(tmp_path / "model.weights.h5")
    fresh = language_model()
    fresh.build((None, None))
    fresh.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(fresh.predict(x, verbose=0), expected)


def test_export_writes_no_state(tmp_path):
    x, y = next_words()
    model = language_model()
    model.compile("adam", CROSS_ENTROPY)
    model.fit(x, y, verbose=0)
    model.export(tmp_path / "1", verbose=False)
    served = tf.saved_model.load(tmp_path / "1")
    np.testing.assert_allclose(
        served.serve(tf.constant(x, "float32")), model.predict(x, verbose=0), rtol=1e-5, atol=1e-6
    )
    graph = served.signatures["serving_default"].graph.as_graph_def()
    functions = [f.node_def for f in graph.library.function] + [graph.node]
    operations = {node.op for nodes in functions for node in nodes}
    assert "MatMul" in operations
    assert not {op for op in operations if "Assign" in op or "Random" in op}


def test_config_carries_every_argument():
    arguments = {
        "num_experts": 6,
        "hidden_units": [4, 5],
        "k": 3,
        "activation": "gelu",
        "output_dim": 7,
        "use_bias": True,
        "gating": "softmax",
        "importance_loss_weight": 0.3,
        "load_loss_weight": 0.2,
        "kernel_initializer": keras.initializers.HeNormal(seed=1),
        "bias_initializer": keras.initializers.Constant(0.5),
        "kernel_regularizer": keras.regularizers.L1(0.1),
        "bias_regularizer": keras.regularizers.L2(0.2),
        "seed": 9,
        "name": "mixture",
    }
    serialized = {
        key: keras.saving.serialize_keras_object(value)
        if key.endswith(("initializer", "regularizer"))
        else value
        for key, value in arguments.items()
    }
    # Softmax gating takes every expert.
    for gating, k in (("softmax", 6), ("noisy_top_k", 3)):
        layer = SparseMoE(**{**arguments, "gating": gating})
        config = layer.get_config()
        assert {**serialized, "gating": gating, "k": k}.items() <= config.items()
        bank = SparseMoE.from_config(config).experts.get_config()
        assert {key: bank[key] for key in serialized if key in bank and key != "name"} == {
            key: serialized[key] for key in serialized if key in bank and key != "name"
        }


def test_config_carries_a_gating_and_a_bank_of_ones_own():
    layer = SparseMoE(
        6,
        gating=keras_moe.NoisyTopKGating(6, k=3, noise=False),
        experts=keras_moe.FeedForwardExperts(6, [4, 4], use_bias=True),
    )
    x = np.random.default_rng(0).normal(size=(5, WIDTH)).astype("float32")
    y = layer(x)
    clone = SparseMoE.from_config(layer.get_config())
    clone.build(x.shape)
    clone.set_weights(layer.get_weights())
    np.testing.assert_array_equal(clone(x), y)
    assert clone.get_config() == layer.get_config()
    assert [tuple(v.shape) for v in clone.experts.kernels] == [(6, 6, 4), (6, 4, 4), (6, 4, 6)]
    assert not hasattr(clone.gating, "noise_kernel")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 4, "hidden_units": 8, "k": 5}, "k=5, num_experts=4"),
        ({"num_experts": 4, "hidden_units": 8, "k": 0}, "k=0, num_experts=4"),
        ({"num_experts": 0, "hidden_units": 8}, "`num_experts` must be .* Received: 0"),
        ({"num_experts": 4.0, "hidden_units": 8}, "`num_experts` must be .* Received: 4.0"),
        ({"num_experts": True, "hidden_units": 8}, "`num_experts` must be .* Received: True"),
        ({"num_experts": 4, "hidden_units": 8, "k": 2.5}, "k=2.5, num_experts=4"),
        ({"num_experts": 4, "hidden_units": 8, "k": "2"}, "k='2', num_experts=4"),
        ({"num_experts": 4, "hidden_units": 0}, "`hidden_units` must be .* Received: 0"),
        ({"num_experts": 4, "hidden_units": "8"}, "`hidden_units` must be .* Received: '8'"),
        ({"num_experts": 4, "hidden_units": [8, 2.5]}, "`hidden_units` must be .* Received: 2.5"),
        ({"num_experts": 4, "hidden_units": []}, r"`hidden_units` must have an entry"),
        ({"num_experts": 4, "hidden_units": 8, "output_dim": 0}, "`output_dim`.*Received: 0"),
        ({"num_experts": 4}, "either `hidden_units`"),
        (
            {"num_experts": 4, "hidden_units": 8, "experts": keras_moe.FeedForwardExperts(4, 8)},
            "either `hidden_units`",
        ),
        ({"num_experts": 4, "hidden_units": 8, "gating": "top"}, "noisy_top_k.*Received: 'top'"),
        (
            {"num_experts": 4, "hidden_units": 8, "gating": keras_moe.NoisyTopKGating(8)},
            "4 experts, .* made for 8",
        ),
        (
            {"num_experts": 4, "experts": keras_moe.FeedForwardExperts(5, 8)},
            "4 experts, .* made for 5",
        ),
        ({"num_experts": 4, "experts": keras.layers.Dense(4)}, "attribute `num_experts`"),
        (
            {"num_experts": 4, "experts": keras_moe.FeedForwardExperts(4, 8), "use_bias": True},
            "beside `experts`: use_bias",
        ),
        ({"num_experts": 4, "hidden_units": 8, "load_loss_weight": float("nan")}, "Received: nan"),
        (
            {"num_experts": 4, "hidden_units": 8, "load_loss_weight": -1},
            "`load_loss_weight` must be a number, not negative. Received: -1",
        ),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SparseMoE(**arguments)


@pytest.mark.parametrize("shape", [(3,), (None, None), (2, 2, 2, 2, 2)])
def test_wrong_inputs_are_refused(shape):
    with pytest.raises(ValueError, match="rank 2 to 4 whose last dimension is known"):
        SparseMoE(4, 8)(keras.KerasTensor(shape))


@pytest.mark.parametrize("shape", [(2,), (3, 2), (2, 1), (2, 3, 1)])
def test_a_mask_of_the_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError, match="one entry for each position"):
        SparseMoE(4, 8)(np.ones((2, 3, WIDTH)), mask=np.ones(shape, bool))


def test_one_layer_takes_inputs_of_every_rank_but_of_one_width():
    layer = SparseMoE(4, 8, k=2)
    layer.route(np.ones((5, WIDTH)))
    assert layer(np.ones((2, 3, WIDTH))).shape == (2, 3, WIDTH)
    assert layer(np.ones((2, 1, 3, WIDTH))).shape == (2, 1, 3, WIDTH)
    with pytest.raises(ValueError, match="expected axis -1 of input shape to have value 6"):
        layer(np.ones((2, 3, WIDTH + 1)))
    with pytest.raises(ValueError, match="built for inputs of width 6"):
        layer.route(np.ones((2, WIDTH + 1)))
    with pytest.raises(ValueError, match="rank 2 to 4"):
        layer.route(np.ones((1, 1, 1, 2, WIDTH)))


@keras.saving.register_keras_serializable("tests")
class LastExperts(keras.layers.Layer):
    """A gating of a user's own, as documented: a sublayer, no `build`, K = 2 fixed experts."""

    def __init__(self, num_experts, **kwargs):
        super().__init__(**kwargs)
        self.num_experts = num_experts
        self.supports_masking = True
        self.preference = keras.layers.Dense(2, "softmax")

    def call(self, x, training=None, mask=None):
        gates = self.preference(x)
        if mask is not None:
            gates *= keras.ops.cast(mask[:, None], gates.dtype)
        index = keras.ops.zeros_like(gates, "int32") + [self.num_experts - 1, 0]
        uses = keras.ops.sum(gates, axis=0)
        load = keras.ops.concatenate([uses[1:], keras.ops.zeros(self.num_experts - 2), uses[:1]])
        return keras_moe.Routing(index, gates, load, load)

    def get_config(self):
        return {**super().get_config(), "num_experts": self.num_experts}


def test_a_gating_of_ones_own_trains_saves_and_loads(tmp_path):
    x, y = next_words()
    model = keras.Sequential(
        [
            keras.layers.Embedding(50, 8, mask_zero=True),
            SparseMoE(5, 16, gating=LastExperts(5)),
            keras.layers.Dense(50),
        ]
    )
    model.build((None, None))
    assert len(model.layers[1].trainable_weights) == 4  # kernel and bias, and two banks
    model.compile(keras.optimizers.Adam(0.03), CROSS_ENTROPY)
    losses = model.fit(x, y, batch_size=16, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert_index": np.zeros((3, 2))}, "`expert_index` .* must be int32"),
        ({"gates": np.ones(3, "float32")}, "`gates` .* must be float32 of shape"),
        ({"gates": np.ones((3, 1), "float32")}, r"`gates` .* Received: float32 of shape \(3, 1\)"),
        ({"importance": np.ones((3, 4), "float32")}, r"`importance` .* float32 of shape \[4\]"),
        ({"load": np.ones(5, "float32")}, r"`load` .* Received: float32 of shape \(5,\)"),
    ],
)
def test_a_wrong_routing_is_refused(change, message):
    routing = {
        "expert_index": np.zeros((3, 2), "int32"),
        "gates": np.ones((3, 2), "float32"),
        "importance": np.ones(4, "float32"),
        "load": np.ones(4, "float32"),
    }
    routing = {key: tf.constant(value) for key, value in {**routing, **change}.items()}
    with pytest.raises(ValueError, match=message):
        check_routing(keras_moe.Routing(**routing), 4)
    with pytest.raises(ValueError, match="must return a `Routing`"):
        check_routing(tuple(routing.values()), 4)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_stays_close_to_float32(policy):
    x = np.random.default_rng(0).normal(size=(EXAMPLES, WIDTH)).astype("float32")
    full = SparseMoE(4, HIDDEN, k=2, seed=1)
    mixed = SparseMoE(4, HIDDEN, k=2, seed=1, dtype=policy)
    for layer in (full, mixed):
        layer.build(x.shape)
    assign_random_weights(full, np.random.default_rng(1))
    mixed.set_weights(full.get_weights())
    x = x.astype("float16" if policy == "mixed_float16" else tf.bfloat16.as_numpy_dtype)
    x = x.astype("float32")  # the same numbers for both, so that both choose the same experts
    np.testing.assert_array_equal(mixed.route(x).expert_index, full.route(x).expert_index)
    y_full, _, d_full = gradients(full, x, 1.0, training=False)
    y_mixed, _, d_mixed = gradients(mixed, x, 1.0, training=False)
    assert y_mixed.dtype == mixed.compute_dtype
    # 11 and 8 significant bits in the products: 2⁻¹¹ and 2⁻⁸, a few of them added up.
    tolerance = 2.0**-8 if policy == "mixed_float16" else 2.0**-5
    for name in ("x", "gate_kernel", "kernels"):
        for ours, theirs in zip(
            keras.tree.flatten(d_mixed[name]), keras.tree.flatten(d_full[name]), strict=True
        ):
            scale = np.abs(theirs).max()
            np.testing.assert_allclose(ours / scale, theirs / scale, atol=tolerance, err_msg=name)
    np.testing.assert_allclose(np.float32(y_mixed), y_full, atol=tolerance * np.abs(y_full).max())


@pytest.mark.parametrize("floatx", ["float64", "float16"])
def test_the_noise_does_not_depend_on_floatx(floatx):
    keras.config.set_floatx(floatx)
    try:
        y = SparseMoE(4, 8, k=2)(np.ones((3, WIDTH)), training=True)
    finally:
        keras.config.set_floatx("float32")
    assert np.isfinite(y).all()


def test_runs_repeat_with_the_global_seed_and_layers_differ():
    x, y = next_words()

    def fit():
        model = language_model()  # which sets the seed
        model.compile("adam", CROSS_ENTROPY)
        model.fit(x, y, verbose=0, shuffle=False)
        return model.get_weights()

    for first, again in zip(fit(), fit(), strict=True):
        np.testing.assert_array_equal(first, again)
    one, other = (SparseMoE(8, 4).route(np.ones((9, WIDTH)), training=True) for _ in range(2))
    assert np.any(one.expert_index != other.expert_index)


def test_a_layer_shared_by_two_branches_adds_its_losses_twice():
    inputs = keras.Input((None, WIDTH))
    shared = SparseMoE(4, 8, k=2)
    model = keras.Model(inputs, shared(inputs) + shared(2.0 * inputs))
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    x = np.random.default_rng(0).normal(size=(2, 3, WIDTH)).astype("float32")
    np.testing.assert_allclose(clone(x), shared(x) + shared(2 * x), rtol=1e-5)
    assert len(clone.losses) == 4


def test_default_names_read_well():
    keras.backend.clear_session()
    assert [SparseMoE(4, 8).name for _ in range(2)] == ["sparse_moe", "sparse_moe_1"]
