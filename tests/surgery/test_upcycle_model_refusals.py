"""What `upcycle_model` refuses, leaving the model as it was."""

import keras
import numpy as np
import pytest
from dense_models import (
    OwnGraph,
    Plain,
    assert_computes,
    called,
    feed_forward,
    sequential,
    shaken,
)
from helpers import WIDTH
from trained_layers import X

from keras_moe import dense_pairs, upcycle_model

layers = keras.layers


@pytest.mark.parametrize(
    "then",
    [
        lambda hidden, down: down(keras.ops.silu(hidden)),
        lambda hidden, down: down(hidden) + hidden,
        lambda hidden, down: down(keras.ops.concatenate([hidden[:, 3:], hidden[:, :3]], axis=-1)),
    ],
    ids=["an activation between", "the hidden layer used twice", "another order between"],
)
def test_a_model_that_would_compute_something_else_is_refused_and_left_as_it_was(then):
    model = shaken(called(Plain(layers.Dense(2), then)))
    parts, expected = (model.up, model.down), model(X)
    with pytest.raises(ValueError, match="outputs of the model would change.*off by up to"):
        upcycle_model(model, dense_pairs(model), 4, k=2, in_place=True)
    assert (model.up, model.down) == parts and type(model) is Plain
    assert_computes(model, expected, 0)


def shared_weight():
    """Two layers in a graph, one of which holds the other."""

    class Tied(layers.Layer):
        def __init__(self, embedding, **kwargs):
            super().__init__(**kwargs)
            self.embedding = embedding

        def call(self, x):
            return keras.ops.matmul(x, keras.ops.transpose(self.embedding.embeddings))

        def get_config(self):
            embedding = keras.saving.serialize_keras_object(self.embedding)
            return {**super().get_config(), "embedding": embedding}

        @classmethod
        def from_config(cls, config):
            embedding = keras.saving.deserialize_keras_object(config.pop("embedding"))
            return cls(embedding, **config)

    embedding = layers.Embedding(5, WIDTH)
    inputs = keras.Input((3,), dtype="int32")
    y = embedding(inputs)
    for layer in feed_forward():
        y = layer(y)
    return keras.Model(inputs, Tied(embedding)(y))


@pytest.mark.parametrize(
    ("make", "choose", "options", "message"),
    [
        (lambda: keras.Sequential(feed_forward()), list, {}, "must be a Keras model that is built"),
        (sequential, lambda pairs: [], {}, "at least one. Received: \\[\\]"),
        (sequential, lambda pairs: pairs[0], {}, "list of chains of layers"),
        (sequential, lambda pairs: [pairs[0], pairs[0]], {}, "in one chain.*twice: \\['dense"),
        (sequential, lambda pairs: [pairs[0][::-1]], {}, "must be linear.*'gelu'"),
        (sequential, lambda pairs: dense_pairs(sequential()), {}, "inside the model 'mlp'"),
        (sequential, list, {"in_place": True}, "cannot be changed in place"),
        (sequential, list, {"activation": "relu"}, "leave them out.*activation"),
        (sequential, list, {"k": 5}, "`k`.*k=5, num_experts=4"),
        (OwnGraph, list, {}, "where no other can be put.*class of its own"),
        (shared_weight, list, {}, "hold one another's weights"),
        (sequential, list, {"x": np.zeros((2, WIDTH + 1))}, "to have value 6.*shape \\(2, 7\\)"),
    ],
)
def test_what_cannot_be_had_is_said(make, choose, options, message):
    model = make()
    pairs = choose(dense_pairs(model)) if model.built else []
    with pytest.raises(ValueError, match=message):
        upcycle_model(model, pairs, 4, **options)
