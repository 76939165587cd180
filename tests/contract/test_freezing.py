"""Frozen stays frozen through what is done to layers; each layer by itself: `test_contract.py`."""

import keras
import numpy as np
import pytest
from helpers import WIDTH
from trained_layers import X, arrays, assert_same, trained

import keras_moe
from keras_moe import FeedForwardExperts, HierarchicalMoE, LayerExperts, SparseMoE
from keras_moe.models import LanguageModel, TranslationModel

TOKENS = np.random.default_rng(0).integers(1, 9, size=(3, 4))


def expert():
    return keras.Sequential([keras.layers.BatchNormalization(), keras.layers.Dense(WIDTH)])


def trainable(layer):
    return [weight.trainable for weight in layer.weights]


@pytest.mark.parametrize(
    "make",
    [
        lambda: SparseMoE(4, 8, k=2, num_shared_experts=1),
        lambda: HierarchicalMoE(2, 2, 4, k=(1, 1)),
        lambda: SparseMoE(4, k=2, experts=expert(), num_shared_experts=1),
    ],
)
@pytest.mark.parametrize("part", ["gating", "experts", "shared_experts", None])
def test_surgery_keeps_what_is_frozen(make, part):
    layer = trained(make())
    frozen = layer if part is None else getattr(layer, part)
    if frozen is None:
        return
    frozen.trainable = False
    unit = layer.num_experts // 2
    for new in (keras_moe.grow(layer, layer.num_experts + unit), keras_moe.prune(layer, [1, 0])):
        parts = ("gating", "experts", "shared_experts")
        for name in parts:
            if getattr(new, name) is not None:
                kept = trainable(getattr(layer, name))
                assert set(trainable(getattr(new, name))) == set(kept)
        assert new.trainable == layer.trainable
        assert bool(new.trainable_weights) == (part is not None)


def test_an_experts_copies_are_as_frozen_as_it_is():
    layer = trained(SparseMoE(3, k=2, experts=expert(), num_shared_experts=2))
    layer.experts.layers[1].trainable = False
    layer.experts.layers[2].layers[1].trainable = False  # the Dense, not the normalization
    layer.shared_experts.layers[0].trainable = False
    states = [trainable(one) for one in layer.experts.layers]
    grown, pruned = keras_moe.grow(layer, 6), keras_moe.prune(layer, [2, 1], k=1)
    assert [trainable(one) for one in grown.experts.layers] == states * 2
    assert [trainable(one) for one in pruned.experts.layers] == [states[2], states[1]]
    for new in (grown, pruned):
        shared = [trainable(one) for one in new.shared_experts.layers]
        assert shared == [trainable(one) for one in layer.shared_experts.layers]


def test_upcycled_layers_are_as_frozen_as_the_dense_ones():
    def dense(*states):
        layers = [keras.layers.Dense(8, "relu"), keras.layers.Dense(WIDTH)]
        model = keras.Sequential([keras.Input((WIDTH,)), *layers])
        for layer, state in zip(layers, states, strict=True):
            layer.trainable = state
        return model

    layer = keras_moe.upcycle(dense(False, False), 4, k=2)
    assert not any(trainable(layer.experts)) and all(trainable(layer.gating))
    assert all(trainable(keras_moe.upcycle(dense(True, True), 4, k=2)))
    assert not any(trainable(keras_moe.upcycle(dense(True, True), 4, k=2, trainable=False)))
    with pytest.raises(ValueError, match=r"or none must be frozen.*Received: .*\[False, True\]"):
        keras_moe.upcycle(dense(False, True), 4)


def test_shared_experts_of_a_frozen_bank_begin_anew_and_train():
    layer = SparseMoE(
        3, k=1, experts=FeedForwardExperts(3, 4, trainable=False), num_shared_experts=1
    )
    layer.build((None, WIDTH))
    assert not any(trainable(layer.experts)) and all(trainable(layer.shared_experts))
    again = SparseMoE.from_config(layer.get_config())
    again.build((None, WIDTH))
    assert trainable(again) == trainable(layer)


def test_a_frozen_layer_does_not_train_but_passes_gradients():
    x = keras.Input((WIDTH,))
    first, mixture = keras.layers.Dense(WIDTH), SparseMoE(4, 8, k=2, trainable=False)
    model = keras.Model(x, keras.layers.Dense(1)(mixture(first(x))))
    before, others = arrays(mixture), arrays(first)
    model.compile("sgd", "mse")
    model.fit(X, X[:, :1], verbose=0)
    assert_same(arrays(mixture), before)
    assert np.any(arrays(first)[0] != others[0])
    mixture.trainable = True
    model.compile("sgd", "mse")
    model.fit(X, X[:, :1], verbose=0)
    assert np.any(arrays(mixture)[-1] != before[-1])


def test_frozen_experts_keep_their_statistics():
    for freeze in (True, False):
        layer = SparseMoE(2, k=2, experts=expert(), capacity_factor=1.0)
        layer.build((None, WIDTH))
        layer.experts.layers[0].trainable = not freeze
        layer(X, training=True)
        moving = [one.layers[0].moving_mean for one in layer.experts.layers]
        assert [bool(np.any(mean)) for mean in moving] == [not freeze, True]


class Deferred(keras.layers.Layer):
    """Makes its parts when it is built, as `keras.layers.MultiHeadAttention` does."""

    def build(self, shape):
        self.dense = keras.layers.Dense(shape[-1])
        self.dense.build(shape)

    def call(self, x):
        return self.dense(x)


def test_what_a_frozen_expert_makes_later_is_frozen(tmp_path):
    with keras.saving.custom_object_scope({"Deferred": Deferred}):
        layer = SparseMoE(2, k=1, experts=Deferred(), trainable=False)
        layer.build((None, WIDTH))
        assert not any(trainable(layer))
        bank = LayerExperts(2, Deferred())
        bank.layers[0].trainable = False
        bank.build((None, WIDTH))
        assert trainable(bank) == [False, False, True, True]
        model = keras.Sequential([keras.Input((WIDTH,)), SparseMoE(2, k=1, experts=bank)])
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert trainable(loaded) == trainable(model)


def language_model(**options):
    moe = SparseMoE(3, 4, k=1, name="moe")
    return LanguageModel(9, 8, moe, lstm_units=12, num_sampled=None, **options), TOKENS


def translation_model(**options):
    middles = [SparseMoE(3, 4, k=1, name=f"moe_{i}") for i in range(2)]
    return TranslationModel(9, 8, *middles, attention="additive", **options), (TOKENS, TOKENS)


@pytest.mark.parametrize("make", [language_model, translation_model])
def test_models_of_words_stay_frozen(make, tmp_path):
    model, tokens = make(trainable=False)
    model(tokens)
    assert not any(trainable(model))
    model.trainable = True
    assert all(trainable(model))

    def freeze_some(model):
        model.softmax.trainable = False
        lstms = model.lstms if make is language_model else model.encoder_lstms
        lstms[0].cell.trainable = False
        moe = model.middle if make is language_model else model.decoder_middle
        moe.gating.trainable = False

    freeze_some(model)
    kept = trainable(model)
    assert 0 < sum(kept) < len(kept)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert trainable(loaded) == kept

    # The same inside another model.
    inner, _ = make()
    inner.trainable = False
    inputs = keras.tree.map_structure(lambda _: keras.Input((None,), dtype="int32"), tokens)
    outer = keras.Model(inputs, keras.layers.Dense(2)(inner(inputs)))
    outer.save(tmp_path / "outer.keras")
    for copied in (keras.models.load_model(tmp_path / "outer.keras"), outer):
        assert len(copied.trainable_weights) == 2
    assert len(keras.models.clone_model(outer).trainable_weights) == 2
