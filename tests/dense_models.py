"""Models with dense layers, in all ways in which Keras has models: for the tests of upcycling."""

import keras
import numpy as np
from helpers import WIDTH
from trained_layers import X

from keras_moe import SparseMoE

layers = keras.layers


def feed_forward(activation="gelu", units=8, **kwargs):
    return [layers.Dense(units, activation, **kwargs), layers.Dense(WIDTH, **kwargs)]


@keras.saving.register_keras_serializable("tests")
class Block(layers.Layer):
    """As in many tutorials: a `Sequential` inside a block."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        up, down = feed_forward(units=units)
        self.ffn = keras.Sequential([up, layers.Dropout(0.1), down])

    def build(self, input_shape):
        self.ffn.build(input_shape)

    def call(self, x):
        return x + self.ffn(x)

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable("tests")
class Held(keras.Model):
    """Layers in a list in a dict, one of them held twice, and blocks."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.parts = {"ffn": feed_forward("relu")}
        self.again = self.parts["ffn"][0]
        self.blocks = (Block(5), Block(7))

    def call(self, x):
        for block in self.blocks:
            x = block(x)
        return x + self.parts["ffn"][1](self.again(x))


class Plain(keras.Model):
    """Without a configuration: Keras can't write down a layer as an argument."""

    def __init__(self, last, then=None):
        super().__init__()
        self.up, self.down = feed_forward("relu", units=WIDTH)
        self.last, self.then = last, then or (lambda hidden, down: down(hidden))

    def call(self, x):
        return self.last(self.then(self.up(x), self.down))


@keras.saving.register_keras_serializable("tests")
class OwnStep(keras.Model):
    """A functional model with a step of its own."""

    def train_step(self, data):
        return super().train_step(data)


class OwnGraph(keras.Model):
    """A graph of a class of its own, as the models of keras-hub are."""

    def __init__(self, **kwargs):
        inputs = keras.Input((WIDTH,))
        self.up, self.down = feed_forward()
        super().__init__(inputs, self.down(self.up(inputs)), **kwargs)

    def get_config(self):
        return {"name": self.name}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


@keras.saving.register_keras_serializable("tests")
class BlockInGraph(keras.Model):
    """A graph of a class of its own with a block that is nowhere else."""

    def __init__(self, **kwargs):
        inputs = keras.Input((WIDTH,))
        self.head = layers.Dense(3)
        super().__init__(inputs, self.head(Block(5)(inputs)), **kwargs)

    def get_config(self):
        return {"name": self.name}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


def sequential():
    return keras.Sequential(
        [keras.Input((WIDTH,)), *feed_forward(), layers.Dense(7, "relu"), layers.Dense(1)],
        name="mlp",
    )


def functional():
    """A residual, an activation layer, a block called twice, models inside, two outputs."""
    inputs = keras.Input((WIDTH,), name="inputs")
    hidden = layers.Dropout(0.1)(layers.LeakyReLU(0.1)(layers.Dense(9)(inputs)))
    y = inputs + layers.Dense(WIDTH)(hidden)
    block = Block(5, name="block")
    y = block(block(y))
    inner = keras.Input((WIDTH,))
    y = keras.Model(inner, keras.Sequential(feed_forward("tanh"))(inner), name="inner")(y)
    return OwnStep(inputs, {"y": y, "head": layers.Dense(2)(y)}, name="functional")


def held():
    return called(Held(name="held"))


def called(model):
    model(X)
    return model


def shaken(model):
    """The model with weights that show what it computes, biases too."""
    rng = np.random.default_rng(1)
    for weight in model.weights:
        weight.assign(0.5 * rng.normal(size=weight.shape))
    return model


def assert_computes(model, expected, tolerance=1e-5):
    flat = zip(keras.tree.flatten(model(X)), keras.tree.flatten(expected), strict=True)
    for y, before in flat:
        np.testing.assert_allclose(y, before, rtol=tolerance, atol=tolerance)


def mixtures(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, SparseMoE)]
