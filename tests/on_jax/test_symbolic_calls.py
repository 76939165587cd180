"""Calls whose shapes have names in place of numbers."""

import keras
from helpers import WIDTH

from keras_moe import HierarchicalGating, HierarchicalMoE, SparseMoE


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
