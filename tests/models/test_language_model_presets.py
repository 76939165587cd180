"""`LanguageModel`: every preset of Table 7 in small, trained, saved, its forward pass by hand."""

import dataclasses

import keras
import numpy as np
import pytest
from combinations import covering, few_in_jax
from compiled_once import at_once
from keras.ops import convert_to_numpy as numpy

from keras_moe import SparseMoE
from keras_moe.models import TABLE_7, LanguageModel

VOCABULARY = 30
TOKENS = np.array([[2, 5, 9, 7], [2, 8, 0, 0]])
TARGETS = np.array([[5, 9, 7, 2], [8, 2, 0, 0]])
SMALL = {
    name: dataclasses.replace(preset, num_experts=min(preset.num_experts, 32))
    for name, preset in TABLE_7.items()
}


# With 32 experts at most, MoE-256 is MoE-32, and all three MoE-...-h are one. MoE-34M has a graph.
LIKE_OTHERS = ("MoE-256", "MoE-1024-h", "MoE-4096-h", "MoE-34M")
USUAL = [*((name, True) for name in SMALL if name not in LIKE_OTHERS), ("MoE-34M", False)]
EAGERLY = keras.config.backend() == "tensorflow"
if not EAGERLY:
    # Each is compiled for seconds: one of each kind of middle layer.
    USUAL = [("MoE-256-h", False), ("MoE-1-Deep", False), ("4xLSTM-512", False)]


@covering(usual=USUAL, name=SMALL.keys(), eager=[True, False])
def test_a_preset_trains_with_compile_and_fit(name, eager):
    keras.utils.set_random_seed(0)
    model = LanguageModel.from_preset(SMALL[name], VOCABULARY, width=8, dropout=0.0)
    model.compile(keras.optimizers.Adam(0.03), run_eagerly=eager)
    before = model.evaluate(TOKENS, TARGETS, verbose=0, return_dict=True)["perplexity"]
    model.fit(TOKENS, TARGETS, epochs=15, verbose=0)
    after = model.evaluate(TOKENS, TARGETS, verbose=0, return_dict=True)["perplexity"]
    # Untrained it is about as unsure as an even choice among 30 words.
    assert 20 < before < 45
    assert after < 0.7 * before


def made(**kwargs):
    keras.utils.set_random_seed(0)
    return LanguageModel(VOCABULARY, 8, SparseMoE(4, 8, k=2, name="moe"), dropout=0.3, **kwargs)


def test_perplexity_counts_every_word_but_padding():
    model = made()
    model.compile("sgd")
    logs = model.evaluate(TOKENS, TARGETS, verbose=0, return_dict=True)
    predictions = at_once(lambda: model(TOKENS))
    chances = np.take_along_axis(np.exp(predictions), TARGETS[..., None], axis=-1)[..., 0]
    mean = -np.log(chances[TARGETS > 0]).mean()
    np.testing.assert_allclose(logs["perplexity"], np.exp(mean), rtol=1e-5)
    # The loss besides has the mixture's balance losses, 0.1 each.
    balance = 0.1 * (logs["moe/cv_importance"] ** 2 + logs["moe/cv_load"] ** 2)
    np.testing.assert_allclose(logs["loss"], mean + balance, rtol=1e-5)


def test_a_batch_without_words_has_no_loss_and_changes_nothing():
    # As a replica gets it where there are fewer sentences than replicas.
    model = made()
    model.compile("sgd")
    model.build((None, None))
    before = model.get_weights()
    assert model.train_on_batch(0 * TOKENS, 0 * TARGETS, return_dict=True)["loss"] == 0
    np.testing.assert_equal(model.get_weights(), before)


def test_residuals_and_the_sigmoid_stand_where_appendix_c_puts_them():
    model = made()
    model.build((None, None))

    def of(layer, *args, **kwargs):
        return numpy(at_once(lambda: layer(*args, **kwargs)))

    # x + LSTM(x), x + σ(MoE(x)), x + LSTM(x), then log-softmax; no dropout outside training.
    x = of(model.embedding, TOKENS)
    x = x + of(model.lstms[0], x)
    x = x + 1 / (1 + np.exp(-of(model.middle, x, mask=TOKENS > 0)))
    x = x + of(model.lstms[1], x)
    logits = x @ numpy(model.softmax.kernel) + numpy(model.softmax.bias)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(at_once(lambda: model(TOKENS)), expected, rtol=1e-4, atol=1e-5)


def test_dropout_is_on_every_layers_output_before_the_residual():
    model = made()
    model.build((None, None))
    calls = []
    drop = model.dropout.call
    model.dropout.call = lambda x, training=False: (
        calls.append((x.shape, training)) or drop(x, training=training)
    )
    log_probs = at_once(lambda: model(TOKENS, training=True))
    assert calls == [((2, 4, 8), True)] * 4  # embedding, LSTM, mixture, LSTM
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=-1), np.ones((2, 4)), rtol=1e-5)


def test_later_words_and_padding_change_nothing():
    model = made()
    model.build((None, None))
    predictions = at_once(lambda: model(np.array([[2, 5, 9, 7, 3]])))
    np.testing.assert_allclose(np.exp(predictions).sum(axis=-1), np.ones((1, 5)), rtol=1e-5)
    other_end = at_once(lambda: model(np.array([[2, 5, 9, 4, 0]])))
    np.testing.assert_allclose(predictions[:, :3], other_end[:, :3], rtol=1e-5)


SAVED = {name: SMALL[name] for name in ("LSTM-2048-512", "MoE-1-Deep", "MoE-256-h")}


@pytest.mark.parametrize("preset", few_in_jax(SAVED, ["MoE-256-h"]))
def test_saved_model_comes_back(preset, tmp_path):
    model = LanguageModel.from_preset(preset, VOCABULARY, width=8, seed=1)
    model.compile("adam", run_eagerly=EAGERLY)
    model.fit(TOKENS, TARGETS, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    received, expected = (at_once(lambda model=model: model(TOKENS)) for model in (loaded, model))
    np.testing.assert_array_equal(received, expected)
    sizes = [{**m.get_config(), "middle": None} for m in (model, loaded)]
    assert sizes[0] == sizes[1]
    assert type(loaded.middle) is type(model.middle)
    # The optimizer comes with its state.
    assert int(loaded.optimizer.iterations) == 1


def test_layers_of_lstms_alone_need_no_middle():
    model = LanguageModel(VOCABULARY, 8, num_lstms=3)
    model.build((None, None))
    assert (len(model.lstms_in), len(model.lstms_out)) == (2, 1)
    assert at_once(lambda: model(TOKENS)).shape == (2, 4, VOCABULARY)


@pytest.mark.parametrize("sizes", [{"width": 0}, {"vocabulary_size": 0}, {"num_lstms": 0}])
def test_bad_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match=f"{next(iter(sizes))}.*Received: .*0"):
        LanguageModel(**{"vocabulary_size": VOCABULARY, "width": 8, **sizes})
