"""Training under JAX: logs and files; the same course as under TensorFlow in `test_files.py`."""

import keras
import numpy as np
import pytest
from combinations import usually
from helpers import CROSS_ENTROPY, language_model, next_words

import keras_moe
from keras_moe import NoisyTopKGating, SparseMoE
from keras_moe.models import LanguageModel


def test_single_steps_do_not_tell_a_balance_from_before_them():
    model, (x, y) = language_model(), next_words()
    model.compile("sgd", CROSS_ENTROPY)
    for step in (model.train_on_batch, model.test_on_batch):
        for _ in range(2):
            logs = step(x, y, return_dict=True)
            assert np.isfinite(logs["loss"])
            assert np.isnan([logs[name] for name in logs if name.startswith("moe/")]).all()
    assert model.get_metrics_result()["moe/max_over_mean_load"] >= 1  # Behind the step it is known.


def test_logs_are_those_of_the_last_epoch():
    model, (x, y) = language_model(), next_words()
    model.compile(keras.optimizers.SGD(0.0), CROSS_ENTROPY)
    history = model.fit(x, y, epochs=2, verbose=0, validation_data=(x, y)).history
    evaluated = model.evaluate(x, y, verbose=0, return_dict=True)
    names = {"moe/cv_importance", "moe/cv_load", "moe/max_over_mean_load"}
    assert names < evaluated.keys()
    # Nothing learns, and evaluation draws no noise: every epoch has the same, of its batches alone.
    for name, value in evaluated.items():
        np.testing.assert_allclose(history[f"val_{name}"], [value, value], rtol=1e-5)
    assert all(np.isfinite(history[name]).all() for name in names)


def test_a_saved_model_is_what_it_was(tmp_path):
    model, (x, y) = language_model(capacity_factor=1.5), next_words()
    model.compile("adam", CROSS_ENTROPY)
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    expected = model.predict(x, verbose=0)
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), expected)
    path = tmp_path / "model.weights.h5"
    keras_moe.save_weights(model, path)
    for weight in loaded.weights:
        weight.assign(0.0 * weight)
    keras_moe.load_weights(loaded, path)
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), expected)


@pytest.mark.parametrize("num_sampled", [20, *usually([], [None])])
def test_a_language_model_counts_words_alone(num_sampled):
    moe = SparseMoE(4, 8, gating=NoisyTopKGating(4, 2), name="moe")
    model = LanguageModel(50, 8, moe, lstm_units=8, num_lstms=2, num_sampled=num_sampled)
    model.compile(keras.optimizers.Adam(0.01))
    x, y = next_words()
    history = model.fit(x, y, epochs=2, verbose=0).history
    if num_sampled is None:
        assert history["perplexity"][1] < history["perplexity"][0]
    log_probs = keras.ops.convert_to_numpy(model(x))
    of_words = np.take_along_axis(log_probs, y[..., None], axis=-1)[..., 0][y > 0]
    received = model.evaluate(x, y, verbose=0, return_dict=True)
    np.testing.assert_allclose(received["perplexity"], np.exp(-of_words.mean()), rtol=1e-4)


def test_what_needs_tensorflow_says_so():
    with pytest.raises(RuntimeError, match=r"needs Keras' backend TensorFlow\. Save the model"):
        keras_moe.export_saved_model(None, "folder")
    with pytest.raises(RuntimeError, match=r"needs Keras' backend TensorFlow\. Save the model"):
        keras_moe.token_signature(None)
