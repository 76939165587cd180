"""Calls whose shapes have names in place of numbers, and calls inside of loops."""

import keras
import numpy as np
import pytest
from helpers import WIDTH

from keras_moe import HierarchicalGating, HierarchicalMoE, NoisyTopKGating, SparseMoE


class Around(keras.layers.Layer):
    """Calls mixtures in its own call, which Keras traces."""

    def __init__(self):
        super().__init__()
        self.flat = SparseMoE(5, 4, k=2, output_dim=3)
        self.hierarchical = HierarchicalMoE(2, 3, 4, output_dim=3, capacity_factor=1.0)

    def call(self, x, training=None):
        return self.flat(x, training=training) + self.hierarchical(x, training=training)


def test_symbolic_calls_of_unknown_sizes():
    y = Around()(keras.Input((None, WIDTH)))
    assert y.shape == (None, None, 3)
    routing = HierarchicalGating(2, 3, k=(1, 2))(keras.Input((WIDTH,)))
    assert routing.expert_index.shape == routing.gates.shape == (None, 2)
    assert routing.load.shape == (6,)


class Cell(keras.layers.Layer):
    """A recurrent cell that is a mixture."""

    state_size = output_size = WIDTH

    def __init__(self):
        super().__init__()
        # Without noise: under JAX Keras itself draws none in a loop (3.15).
        self.moe = SparseMoE(3, 4, gating=NoisyTopKGating(3, 1, noise=False))

    def build(self, shape):
        self.moe.build(shape)

    def call(self, x, states):
        y = self.moe(x, training=True)
        return y, [y]


def test_losses_that_cannot_leave_a_loop_are_left_out():
    model = keras.Sequential([keras.Input((3, WIDTH)), keras.layers.RNN(Cell())])
    model.compile("sgd", "mse")
    x = np.ones((2, 3, WIDTH), "float32")
    model.predict(x, verbose=0)  # Nobody asks for losses, so nobody is warned.
    with pytest.warns(UserWarning, match="cannot leave the loop"):
        model.train_on_batch(x, x[:, 0])
