"""`TranslationModel`: its presets in small, trained, saved, its forward pass layer by layer."""

import dataclasses

import keras
import numpy as np
import pytest
from compiled_once import at_once
from keras.ops import convert_to_numpy as numpy

from keras_moe import HierarchicalBalancedGating, NoisyTopKGating, SparseMoE, StrictlyBalancedGating
from keras_moe.models import TRANSLATION_PRESETS, Preset, TranslationModel

VOCABULARY, END = 20, 2
SOURCE = np.array([[5, 9, 7, 3, 6], [8, 4, 0, 0, 0]])
# The words in reverse.
TARGET = np.array([[END, 6, 3, 7, 9, 5, END], [END, 4, 8, END, 0, 0, 0]])
INPUTS, TARGETS = (SOURCE, TARGET[:, :-1]), TARGET[:, 1:]
SMALL = dataclasses.replace(TRANSLATION_PRESETS["MoE-32"], num_experts=3, k=2, num_lstms=(2, 1))


def test_it_trains_with_compile_and_fit():
    keras.utils.set_random_seed(0)
    model = TranslationModel(VOCABULARY, 8, num_lstms=(2, 1), dropout=0.1, seed=0)
    model.compile(keras.optimizers.Adam(0.02))
    logs = model.fit(INPUTS, TARGETS, epochs=20, verbose=0).history["perplexity"]
    # Untrained it is about as unsure as an even choice among 20 words.
    assert 15 < logs[0] < 27
    assert logs[-1] < 0.3 * logs[0]


def test_mixtures_train_in_mixed_precision_and_a_saved_model_comes_back(tmp_path):
    options = {"width": 8, "seed": 0, "dtype": "mixed_bfloat16"}
    model = TranslationModel.from_preset(SMALL, VOCABULARY, **options)
    model.compile("adam", run_eagerly=keras.config.backend() == "tensorflow")
    model.build(None)
    before = [numpy(weight) for weight in model.trainable_weights]
    logs = model.fit(INPUTS, TARGETS, verbose=0).history
    assert {"encoder_moe/cv_importance", "decoder_moe/max_over_mean_load"} < logs.keys()
    for weight, old in zip(model.trainable_weights, before, strict=True):
        assert np.any(numpy(weight) != old), weight.path
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    predictions = at_once(lambda: model(INPUTS))
    assert predictions.dtype == "float32"
    np.testing.assert_array_equal(at_once(lambda: loaded(INPUTS)), predictions)
    assert int(loaded.optimizer.iterations) == 1
    sizes = [
        {k: v for k, v in m.get_config().items() if "middle" not in k} for m in (model, loaded)
    ]
    assert sizes[0] == sizes[1]
    assert type(loaded.decoder_middle) is type(model.decoder_middle)


def test_presets_are_those_of_appendix_e():
    models = {
        name: TranslationModel.from_preset(name, VOCABULARY, width=8)
        for name in TRANSLATION_PRESETS
    }
    assert models["no-experts"].encoder_middle is models["no-experts"].decoder_middle is None
    gatings = {
        "MoE-32": (StrictlyBalancedGating, 32, 4, 32),
        "MoE-512": (HierarchicalBalancedGating, 512, (2, 2), 32),
        "MoE-2048": (HierarchicalBalancedGating, 2048, (2, 2), 32),
        "multilingual": (NoisyTopKGating, 512, 2, 128),
    }
    for name, expected in gatings.items():
        model = models[name]
        assert (model.lstm_units, model.dropout.rate) == (32, 0.4)
        for moe in (model.encoder_middle, model.decoder_middle):
            (hidden,) = moe.get_config()["hidden_units"]
            assert (type(moe.gating), moe.num_experts, moe.k, hidden) == expected
            assert moe.importance_loss_weight == moe.load_loss_weight == 0.01
            # One over the paper's 16,000 words of a batch, roundly.
            assert getattr(moe.gating, "batchwise_loss_weight", 1e-4) == 1e-4


def made(**kwargs):
    keras.utils.set_random_seed(0)
    middles = [SparseMoE(4, 8, k=2, name=f"{part}_moe") for part in ("encoder", "decoder")]
    model = TranslationModel(
        VOCABULARY, 8, *middles, **{"lstm_units": 10, "dropout": 0.3, **kwargs}
    )
    model.build(None)
    return model


def test_layers_stand_where_appendix_e_puts_them():
    model = made()
    mask = SOURCE > 0

    def of(layer, *args, **kwargs):
        return numpy(at_once(lambda: layer(*args, **kwargs)))

    def mixed(moe, x, mask):
        return x + 1 / (1 + np.exp(-of(moe, x, mask=mask)))

    x = of(model.source_embedding, SOURCE)
    forward, backward = model.both_directions.forward_layer, model.both_directions.backward_layer
    x = x + of(forward, x, mask=mask) + of(backward, x, mask=mask)[:, ::-1]
    x = mixed(model.encoder_middle, x, mask)
    x = x + of(model.encoder_lstms[0], x, mask=mask)
    encoded = x
    x = of(model.target_embedding, INPUTS[1])
    x = x + of(model.attention_lstm, x, encoded, source_mask=mask)
    x = mixed(model.decoder_middle, x, INPUTS[1] > 0)
    x = x + of(model.decoder_lstms[0], x)
    logits = x @ numpy(model.softmax.kernel) + numpy(model.softmax.bias)
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(at_once(lambda: model(INPUTS)), expected, rtol=1e-4, atol=1e-5)


def test_dropout_is_on_every_layers_output_before_the_residual():
    model = made(num_lstms=(4, 2))
    calls = []
    drop = model.dropout.call
    model.dropout.call = lambda x, training=False: (
        calls.append((x.shape[1], training)) or drop(x, training=training)
    )
    log_probs = at_once(lambda: model(INPUTS, training=True))
    # Embedding, both directions, LSTM, mixture, LSTM; embedding, LSTM, mixture, LSTM.
    assert calls == [(5, True)] * 5 + [(6, True)] * 4
    np.testing.assert_allclose(np.exp(log_probs).sum(axis=-1), np.ones((2, 6)), rtol=1e-5)


def test_neighbours_padding_and_later_words_change_nothing():
    model = made()
    both = numpy(at_once(lambda: model(INPUTS)))
    alone = at_once(lambda: model((SOURCE[1:, :2], TARGET[1:, :3])))
    np.testing.assert_allclose(both[1:, :3], alone, rtol=1e-4, atol=1e-5)
    # The first word of the source reaches the last prediction, and the other way round.
    other = numpy(at_once(lambda: model((np.array([[6, 9, 7, 3, 6]]), INPUTS[1][:1]))))
    assert np.all(np.abs(other - both[:1]).max(axis=-1) > 1e-4)


def test_perplexity_counts_every_word_but_padding_and_training_the_same_softmax():
    model = made(dropout=0.0)
    model.compile("sgd", run_eagerly=keras.config.backend() == "tensorflow")
    logs = model.evaluate(INPUTS, TARGETS, verbose=0, return_dict=True)

    def predictions_and_losses():
        # Training computes them of hidden states; those of evaluation here, without noise.
        predictions = model(INPUTS)
        ways = (model.cross_entropy(TARGETS, predictions, training) for training in (False, True))
        return predictions, *ways

    predictions, *ways = map(numpy, at_once(predictions_and_losses))
    words = TARGETS > 0
    chances = np.take_along_axis(np.exp(predictions), TARGETS[..., None], axis=-1)[..., 0]
    losses = -np.log(chances[words])
    np.testing.assert_allclose(logs["perplexity"], np.exp(losses.mean()), rtol=1e-5)
    for received in ways:
        if keras.config.backend() == "jax":  # Of each position, 0 where there is no word.
            assert np.all(received[~words.ravel()] == 0)
            received = received[words.ravel()]
        np.testing.assert_allclose(received, losses, rtol=1e-4, atol=1e-5)


def test_words_are_sampled_where_that_is_asked_for():
    model = made(num_sampled=5, num_lstms=(2, 1))
    assert model.softmax.num_sampled == 5

    def losses():
        predictions = model(INPUTS)
        return [model.cross_entropy(TARGETS, predictions, training) for training in (False, True)]

    whole, sampled = (numpy(x)[numpy(x) != 0] for x in at_once(losses))
    assert len(whole) == len(sampled) == np.sum(TARGETS > 0)
    assert 1 < np.exp(sampled.mean()) < VOCABULARY
    assert np.all(np.abs(sampled - whole) > 1e-3)


def test_a_name_and_a_seed_are_those_of_the_mixtures_as_well():
    model = TranslationModel.from_preset(
        "multilingual", VOCABULARY, width=8, name="several", seed=3
    )
    moes = [model.encoder_middle, model.decoder_middle]
    assert [moe.name for moe in moes] == ["several_encoder_moe", "several_decoder_moe"]
    assert [moe.seed for moe in moes] == [3, 4]


@pytest.mark.parametrize(
    "sizes",
    [
        {"width": 0},
        {"vocabulary_size": 0},
        {"num_lstms": (1, 2)},
        {"num_lstms": (3, 0)},
        {"num_lstms": 3},
        {"attention": "dot"},
    ],
    ids=str,
)
def test_bad_arguments_are_refused(sizes):
    with pytest.raises(ValueError, match=f"`{next(iter(sizes))}` must be .*Received: "):
        TranslationModel(**{"vocabulary_size": VOCABULARY, "width": 8, **sizes})


def test_other_presets_and_inputs_are_refused():
    for preset in ("MoE-4", Preset()):
        with pytest.raises(ValueError, match="`TranslationPreset` or one of no-experts, MoE-32"):
            TranslationModel.from_preset(preset, VOCABULARY)
    with pytest.raises(ValueError, match="called with a pair.*Received"):
        made()(SOURCE)
