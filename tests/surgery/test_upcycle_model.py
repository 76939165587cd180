"""`upcycle_model`: mixtures in the place of dense layers anywhere in a model."""

import json

import keras
import numpy as np
import pytest
from dense_models import (
    BlockInGraph,
    Held,
    Plain,
    assert_computes,
    called,
    feed_forward,
    functional,
    held,
    mixtures,
    sequential,
    shaken,
)
from helpers import WIDTH
from keras.ops import convert_to_numpy as numpy
from trained_layers import QUICK_EAGERLY, X, arrays, assert_same, run_example

from keras_moe import SparseMoE, dense_pairs, upcycle_model
from keras_moe.surgery.replaced_parts import ReplacedParts

layers = keras.layers


@pytest.mark.parametrize(
    ("make", "number"),
    [(sequential, 2), (functional, 3), (held, 3), (BlockInGraph, 1)],
    ids=["sequential", "functional", "subclassed", "in a graph"],
)
# By Keras 3.10, of every functional model of one input that comes from a file.
@pytest.mark.filterwarnings("ignore:The structure of `inputs` doesn't match:UserWarning:keras")
def test_a_whole_model_computes_what_it_did_and_can_be_saved(make, number, tmp_path):
    model = shaken(make())
    pairs, before, expected = dense_pairs(model), arrays(model), model(X)
    assert len(pairs) == number
    upcycled = upcycle_model(model, pairs, 4, k=2, seed=0)
    assert type(upcycled).__name__ == type(model).__name__ and isinstance(upcycled, type(model))
    assert upcycled.name == model.name
    assert_computes(upcycled, expected)
    names = {layer.name for layer in mixtures(upcycled)}
    assert names == {"moe", *(f"moe_{i}" for i in range(1, number))}
    assert {layer.gating.seed for layer in mixtures(upcycled)} == set(range(number))
    # The old one is as it was, and shares no weight with the new one.
    assert_same(arrays(model), before)
    assert not {id(w) for w in model.weights} & {id(w) for w in upcycled.weights}
    # A trained mixture comes back from a file, and no expert is as the others.
    for moe in mixtures(upcycled):
        for weight in moe.weights:
            weight.assign(weight + np.random.default_rng(2).normal(size=weight.shape))
    expected = upcycled(X)
    upcycled.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(loaded, type(model))
    assert_computes(loaded, expected, 1e-6)


def test_some_of_the_pairs_can_be_chosen_and_the_others_later():
    model = shaken(held())
    pairs, expected = dense_pairs(model), model(X)
    once = upcycle_model(model, pairs[::2], 4, k=2)
    assert len(mixtures(once)) == 2
    (left,) = dense_pairs(once)
    assert [layer.units for layer in left] == [layer.units for layer in pairs[1]]
    twice = upcycle_model(once, [left], 2, k=1, name="late")
    assert_computes(twice, expected)
    # In the order of the weights, which that of an optimizer's state follows, nothing has moved.
    assert [layer.name for layer in mixtures(twice)] == [
        {id(pairs[0][0]): "moe", id(pairs[1][0]): "late", id(pairs[2][0]): "moe_1"}[id(layer)]
        for layer in model._flatten_layers()
        if any(layer is pair[0] for pair in pairs)
    ]
    copied = type(twice).from_config(twice.get_config())
    assert [layer.num_experts for layer in mixtures(copied)] == [
        layer.num_experts for layer in mixtures(twice)
    ]


def test_it_trains_on_and_tells_the_experts_apart():
    model = shaken(called(Plain(layers.Dense(WIDTH))))
    upcycle_model(model, dense_pairs(model), 4, k=2, seed=0, in_place=True)
    model.compile(keras.optimizers.Adam(0.01), "mse", run_eagerly=QUICK_EAGERLY)
    logs = model.fit(X, np.sin(X), epochs=6, verbose=0).history
    assert logs["loss"][-1] < 0.9 * logs["loss"][0]
    assert "moe/cv_load" in logs
    # Though the model's `call` has no argument `training`, there was noise.
    kernels = numpy(model.up.experts.kernels[0])
    assert np.all(np.abs(kernels[1:] - kernels[0]).max(axis=(1, 2)) > 1e-3)


def test_a_compiled_model_comes_back_uncompiled():
    model = sequential()
    model.compile("adam", lambda y, y_pred: keras.ops.mean((y - y_pred) ** 2))
    upcycled = upcycle_model(model, dense_pairs(model), 2, k=1)
    assert model.compiled and not upcycled.compiled


def test_what_was_traced_before_a_change_in_place_is_forgotten():
    model = shaken(called(Plain(layers.Dense(WIDTH))))
    model.compile("sgd", "mse")
    expected = model.predict(X, verbose=0)
    upcycle_model(model, dense_pairs(model), 4, k=2, in_place=True)
    for weight in model.up.experts.weights:
        weight.assign(2 * weight)  # The weights that count.
    assert np.abs(model.predict(X, verbose=0) - expected).max() > 0.1
    with pytest.raises(ValueError, match="compile"):
        model.fit(X, X)


def test_a_process_that_has_made_no_such_layer_can_load_one():
    model = shaken(held())
    upcycled = upcycle_model(model, dense_pairs(model)[:1], 4, k=2)
    config = upcycled.get_config()
    # Of the class by which a file is read, not of the one that stands beside it in this process.
    loaded = ReplacedParts.from_config(config)
    assert isinstance(loaded, Held) and len(mixtures(called(loaded))) == 1
    assert json.dumps(config)


def test_one_expert_and_shared_experts_change_nothing_at_first():
    model = shaken(sequential())
    pairs, expected = dense_pairs(model), model(X)
    # One expert of 4 with a gate of 1/4; beside it shared ones, which begin at zero.
    assert_computes(upcycle_model(model, pairs, 4, k=1, num_shared_experts=2), expected)
    assert_computes(upcycle_model(model, pairs, 4, gating="softmax"), expected)


def test_frozen_layers_and_dtypes_carry_over():
    model = shaken(functional())
    model.get_layer("block").trainable = False
    model.get_layer("inner").layers[-1].layers[0].trainable = False
    model.get_layer("inner").layers[-1].layers[1].trainable = False
    upcycled = upcycle_model(model, dense_pairs(model), 4, k=2)
    assert upcycled.get_layer("block").trainable_weights == []
    first, _, last = sorted(mixtures(upcycled), key=lambda moe: moe.name)
    assert first.experts.trainable and not last.experts.trainable and last.gating.trainable

    model.trainable = False
    assert upcycle_model(model, dense_pairs(model)[:1], 4, k=2).trainable_weights == []
    model = held()  # Whose configuration says nothing of the layers inside.
    model.blocks[1].ffn.trainable = False
    upcycled = upcycle_model(model, dense_pairs(model)[:1], 4, k=2)
    assert [block.trainable for block in upcycled.blocks] == [True, True]
    assert [block.ffn.trainable for block in upcycled.blocks] == [True, False]

    mixed = shaken(keras.Sequential([keras.Input((WIDTH,)), *feed_forward(dtype="mixed_bfloat16")]))
    upcycled = upcycle_model(mixed, dense_pairs(mixed), 4, k=2)
    assert mixtures(upcycled)[0].dtype_policy.name == "mixed_bfloat16"
    assert upcycled(X).dtype == mixed(X).dtype  # Of what stands behind the mixture, too.
    assert_computes(upcycled, mixed(X), 1e-2)
    mixed.trainable = False
    assert upcycle_model(mixed, dense_pairs(mixed), 4, k=2).trainable_weights == []


def test_what_a_layer_has_beside_its_weights_is_copied():
    normalization = layers.Normalization()
    normalization.adapt(3 * X + 1)
    twice = layers.Lambda(lambda x: 2 * x)
    model = keras.Sequential([keras.Input((WIDTH,)), normalization, twice, *feed_forward()])
    assert_computes(upcycle_model(model, dense_pairs(model), 4, k=2), model(X))


@pytest.mark.tensorflow("JAX has no strings")
def test_the_words_of_a_lookup_are_copied():
    words = layers.StringLookup(vocabulary=["a", "b"])
    inputs = keras.Input((None,), dtype="string")
    y = layers.Embedding(4, WIDTH)(words(inputs))
    model = keras.Model(inputs, keras.Sequential(feed_forward())(y))
    x = np.array([["a", "b", "c"]])
    upcycled = upcycle_model(model, dense_pairs(model), 4, k=2, x=keras.ops.convert_to_tensor(x))
    np.testing.assert_allclose(
        upcycled(keras.ops.convert_to_tensor(x)), model(keras.ops.convert_to_tensor(x)), atol=1e-6
    )


def test_a_batch_can_be_made_up_where_nothing_tells_the_dtype():
    class Words(keras.Model):
        def __init__(self):
            super().__init__()
            self.embedding = layers.Embedding(2, WIDTH)
            self.up, self.down = feed_forward()

        def call(self, words):
            return self.down(self.up(self.embedding(words)))

    model = Words()
    expected = model(np.array([[1, 0]]))
    # Normal numbers, among them negative ones, are no words: then it is given integers.
    upcycle_model(model, dense_pairs(model), 4, k=2, in_place=True)
    np.testing.assert_allclose(model(np.array([[1, 0]])), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="batch made up for it: give one as `x`"):
        model.call = lambda words: words["no such entry"]
        upcycle_model(model, [[model.embedding]], 4, in_place=True)


def test_padding_does_not_keep_a_model_from_being_compared():
    inputs = keras.Input((None,), dtype="int32")
    y = layers.Embedding(5, WIDTH, mask_zero=True)(inputs)
    for layer in feed_forward():
        y = layer(y)
    model = keras.Model(inputs, layers.GlobalAveragePooling1D()(y))
    upcycled = upcycle_model(model, dense_pairs(model), 4, k=2)
    x = np.array([[1, 4, 0, 0]])
    np.testing.assert_allclose(upcycled(x), model(x), atol=1e-6)


def test_a_model_that_cannot_be_copied_can_be_changed_in_place():
    model = called(Plain(layers.Dense(WIDTH)))
    pairs, expected = dense_pairs(model), model(X)
    with pytest.raises(ValueError, match="copy of Plain.*cannot be made.*`in_place=True`"):
        upcycle_model(model, pairs, 4, k=2)
    assert upcycle_model(model, pairs, 4, k=2, in_place=True) is model
    assert_computes(model, expected)
    assert isinstance(model.up, SparseMoE) and isinstance(model.down, layers.Identity)


def test_only_pairs_that_fit_are_found():
    model = keras.Sequential(
        [
            keras.Input((WIDTH,)),
            layers.Dense(5),  # Linear and without an activation behind it.
            layers.Dense(8),
            layers.ReLU(),
            layers.Dropout(0.1),
            layers.Dense(4, name="fits"),
            layers.Dense(8, "relu"),
            layers.BatchNormalization(),  # Its weights come between.
            layers.Dense(4),
            layers.Dense(8, "relu"),
            layers.Dense(4, use_bias=False),  # The other has one.
            layers.Dense(8, "relu"),
            layers.Dense(4, "softmax"),
        ]
    )
    assert [[type(layer).__name__ for layer in pair] for pair in dense_pairs(model)] == [
        ["Dense", "ReLU", "Dense"]
    ]
    assert dense_pairs(model)[0][-1].name == "fits"
    with pytest.raises(ValueError, match="built.*Received: <Sequential"):
        dense_pairs(keras.Sequential(feed_forward()))


def test_the_examples_run(capsys):
    model = shaken(held())
    expected = model(X)
    upcycled = run_example(upcycle_model, model)
    assert len(mixtures(upcycled)) == 1
    assert_computes(upcycled, expected)
    run_example(dense_pairs, model)
    assert len(capsys.readouterr().out.splitlines()) == 3
