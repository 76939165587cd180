"""`upcycle_model` on the models of keras-hub, their weights random."""

import keras
import keras_hub
import numpy as np
import pytest
from trained_layers import QUICK_EAGERLY

from keras_moe import SparseMoE, dense_pairs, upcycle_model

SIZES = {"vocabulary_size": 30, "num_layers": 2, "num_heads": 2, "hidden_dim": 8}
TOKENS = np.random.default_rng(0).integers(1, 30, size=(3, 5))
X = {"token_ids": TOKENS, "padding_mask": np.ones_like(TOKENS)}


def gpt2():
    return keras_hub.models.GPT2Backbone(**SIZES, intermediate_dim=16, max_sequence_length=9)


def shaken(model):
    rng = np.random.default_rng(1)
    for weight in model.weights:
        weight.assign(0.3 * rng.normal(size=weight.shape))
    return model


def mixtures(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, SparseMoE)]


def test_a_backbone_stays_what_it_is_trains_and_comes_back_from_a_file(tmp_path):
    backbone = shaken(gpt2())
    pairs, expected = dense_pairs(backbone), backbone(X)
    assert [pair[0].units for pair in pairs] == [16, 16]
    upcycled = upcycle_model(backbone, pairs[1::2], 4, k=2, seed=0)
    np.testing.assert_allclose(upcycled(X), expected, rtol=1e-5, atol=1e-5)
    assert isinstance(upcycled, keras_hub.models.GPT2Backbone)
    assert [bool(mixtures(block)) for block in upcycled.transformer_layers] == [False, True]
    (moe,) = mixtures(upcycled)
    assert moe.experts.kernels[0].shape == (4, 8, 16)
    upcycled.compile(keras.optimizers.Adam(0.01), "mse", run_eagerly=QUICK_EAGERLY)
    logs = upcycled.fit(X, np.zeros((3, 5, 8)), epochs=4, verbose=0).history
    assert logs["loss"][-1] < 0.9 * logs["loss"][0]
    expected = upcycled(X)
    upcycled.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded(X), expected, rtol=1e-6, atol=1e-6)
    assert loaded.optimizer.iterations == 4
    for one, other in zip(upcycled.optimizer.variables, loaded.optimizer.variables, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_task_generates_from_mixtures_as_from_dense_layers():
    task = keras_hub.models.GPT2CausalLM(backbone=shaken(gpt2()), preprocessor=None)
    task.compile(sampler="greedy")
    prompts = {"token_ids": TOKENS, "padding_mask": (np.arange(5) < 3) * np.ones((3, 1), int)}
    upcycled = upcycle_model(task, dense_pairs(task), 4, k=2)
    assert isinstance(upcycled, keras_hub.models.GPT2CausalLM)
    assert len(mixtures(upcycled.backbone)) == 2
    upcycled.compile(sampler="greedy")
    # With the cache of keys and values, by which blocks are called with one position each.
    answers = (each.generate(prompts, stop_token_ids=None) for each in (task, upcycled))
    np.testing.assert_array_equal(*(answer["token_ids"] for answer in answers))


def test_blocks_of_decoders_in_a_model_of_ones_own():
    inputs = keras.Input((None, 8))
    decoder = keras_hub.layers.TransformerDecoder(16, 2, activation="gelu", normalize_first=True)
    memory = keras.Input((None, 8))
    model = shaken(keras.Model([inputs, memory], decoder(inputs, memory)))
    upcycled = upcycle_model(model, dense_pairs(model), 3, k=1)
    x = [np.random.default_rng(2).normal(size=(2, 4, 8)).astype("float32") for _ in range(2)]
    np.testing.assert_allclose(upcycled(x), model(x), rtol=1e-5, atol=1e-5)
    copied = type(upcycled).from_config(upcycled.get_config())
    assert len(mixtures(copied)) == 1


def test_gated_blocks_are_refused():
    # Between the two: the product with what a third dense layer returns.
    sizes = {**SIZES, "num_query_heads": SIZES["num_heads"]}
    del sizes["num_heads"]
    model = keras_hub.models.LlamaBackbone(**sizes, num_key_value_heads=2, intermediate_dim=16)
    assert dense_pairs(model) == []
    block = model.transformer_layers[0]
    pair = [block._feedforward_intermediate_dense, block._feedforward_output_dense]
    with pytest.raises(ValueError, match="would change.*as a gated activation is"):
        upcycle_model(model, [pair], 4, k=2)
