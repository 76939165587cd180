"""SparseMoE as a layer among others: fit, masks, logs, saving, export."""

import threading

import keras
import numpy as np
import pytest
from helpers import CROSS_ENTROPY, WIDTH, assign_random_weights, language_model, next_words
from inputs import policies

from keras_moe import SparseMoE

JAX = keras.config.backend() == "jax"


@pytest.mark.parametrize(
    "policy", policies("float32", "mixed_float16", "mixed_bfloat16", "float64")
)
def test_fit_learns_under_every_policy(policy):
    # Each with one of the options; `test_survival_training.py` tells that these change nothing.
    compile_options = {
        "mixed_bfloat16": {"run_eagerly": True},
        "float64": {"steps_per_execution": 2},
    }
    compile_options = {} if JAX else compile_options.get(policy, {})
    model = language_model(policy)
    model.compile(keras.optimizers.Adam(0.03), CROSS_ENTROPY, **compile_options)
    x, y = next_words()
    history = model.fit(x, y, batch_size=16, epochs=8, verbose=0).history
    assert history["loss"][-1] < 0.6 * history["loss"][0]
    assert model.layers[1].gating.gate_kernel.dtype == "float32"
    assert model.layers[1](np.ones((2, 3, 8))).dtype == keras.DTypePolicy(policy).compute_dtype


@pytest.mark.tensorflow("under JAX every model is compiled")
def test_jit_compile_auto_does_not_try_xla():
    model = language_model()
    model.compile("adam", CROSS_ENTROPY)
    assert not model.jit_compile
    assert not model.layers[1].supports_jit


@pytest.mark.tensorflow("JAX traces a function for each shape")
def test_unknown_time_dimension_does_not_retrace():
    import tensorflow as tf

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


@pytest.mark.tensorflow("exports are TensorFlow's")
def test_export_writes_no_state(tmp_path):
    import tensorflow as tf
    from exports import assert_keeps_no_state

    x, y = next_words()
    model = language_model()
    model.compile("adam", CROSS_ENTROPY)
    model.fit(x, y, verbose=0)
    model.export(tmp_path / "1", verbose=False)
    served = tf.saved_model.load(tmp_path / "1")
    np.testing.assert_allclose(
        served.serve(tf.constant(x, "float32")), model.predict(x, verbose=0), rtol=1e-5, atol=1e-6
    )
    assert_keeps_no_state(served)


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


def test_routings_inside_a_model_are_recorded():
    model = language_model()
    x, _ = next_words()
    with model.layers[1].recorded_routings() as routings:
        model(x)
        model(x[:3])
    model(x)
    assert [len(r.gates) for r in routings] == [x.size, x[:3].size]
    expected = model.layers[1].route(model.layers[0](x), mask=x > 0)
    np.testing.assert_array_equal(routings[0].gates, expected.gates)


def test_default_names_read_well():
    keras.backend.clear_session()
    assert [SparseMoE(4, 8).name for _ in range(2)] == ["sparse_moe", "sparse_moe_1"]


def test_recordings_are_of_their_own_thread_and_may_be_nested():
    layer = SparseMoE(4, 8, k=2)
    x = np.ones((3, WIDTH), "float32")
    layer(x)
    with layer.recorded_routings() as outer:
        thread = threading.Thread(target=lambda: layer(np.ones((5, WIDTH), "float32")))
        thread.start()
        thread.join()
        with layer.recorded_routings() as inner:
            layer(x)
        layer(x)
    layer(x)
    assert [len(routing.gates) for routing in inner] == [3]
    assert [len(routing.gates) for routing in outer] == [3, 3]
