"""Growing and pruning a layer with parts of a user's own: gatings, banks, experts of any layer."""

import keras
import numpy as np
import pytest
from helpers import WIDTH
from trained_layers import X, arrays, assert_same, trained

import keras_moe
from keras_moe import SparseMoE
from keras_moe.backend import pieces as pieces_of


class PlainGating(keras.layers.Layer):
    """A gating that knows nothing of keras_moe but its `Routing`."""

    def __init__(self, num_experts, **kwargs):
        super().__init__(**kwargs)
        self.num_experts = num_experts
        self.supports_masking = True

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(input_shape[-1], self.num_experts), name="kernel")
        self.scale = self.add_weight(shape=(input_shape[-1],), name="scale")

    def call(self, x, training=None, mask=None):
        gating = keras.ops.softmax(keras.ops.matmul(x * self.scale, self.kernel))
        index = keras.ops.broadcast_to(keras.ops.arange(self.num_experts), keras.ops.shape(gating))
        return keras_moe.gating.routing.make_routing(index, gating, self.num_experts, mask)


class UnsizedGating(PlainGating):
    def get_config(self):
        return {"name": self.name}


class WrongAxisGating(PlainGating):
    def expert_axis(self, variable):
        return None


class WholeGating(PlainGating):
    def expert_axis(self, variable):
        return {"kernel": 1}.get(variable.name)


@pytest.mark.parametrize(
    ("gating", "message"),
    [
        (UnsizedGating, "Put `num_experts` into what `UnsizedGating.get_config`"),
        (PlainGating, r"Give PlainGating a method `expert_axis\(variable\)`"),
        (WrongAxisGating, r"shape of kernel.*expert_axis None, shape \(6, 4\) before and \(6, 8\)"),
    ],
)
def test_a_gating_of_ones_own_has_to_say_what_belongs_to_an_expert(gating, message):
    layer = trained(SparseMoE(4, 8, gating=gating(4)))
    with pytest.raises(ValueError, match=message):
        keras_moe.grow(layer, 8)


def test_a_gating_of_ones_own_can_be_grown_and_pruned():
    layer = trained(SparseMoE(4, 8, gating=WholeGating(4)))
    grown = keras_moe.grow(layer, 8)
    # Every expert and its copy: half the probability each.
    np.testing.assert_allclose(grown(X), layer(X), rtol=1e-5, atol=1e-5)
    pruned = keras_moe.prune(layer, [3, 1])
    kernel, scale = arrays(layer.gating)
    assert_same(arrays(pruned.gating), [kernel[:, [3, 1]], scale])


class ScaledRows(keras.layers.Layer):
    """The smallest bank of one's own: expert i multiplies its rows by a vector."""

    def __init__(self, num_experts, **kwargs):
        super().__init__(**kwargs)
        self.num_experts = num_experts

    def build(self, rows_shape, rows_per_expert_shape=None):
        self.scale = [
            self.add_weight(shape=(rows_shape[-1],), name=f"scale_{i}")
            for i in range(self.num_experts)
        ]

    def call(self, rows, rows_per_expert):
        *pieces, rest = pieces_of.split(rows, rows_per_expert)
        scaled = [piece * scale for piece, scale in zip(pieces, self.scale, strict=True)]
        return pieces_of.join(scaled, rest)

    def compute_output_shape(self, rows_shape, rows_per_expert_shape=None):
        return rows_shape

    def get_config(self):
        return {**super().get_config(), "num_experts": self.num_experts}


class ScaledRowsByExpert(ScaledRows):
    def copy_experts(self, bank, origins):
        for scale, origin in zip(self.scale, origins, strict=True):
            scale.assign(bank.scale[origin])


def test_a_bank_of_ones_own_is_copied_expert_by_expert():
    with pytest.raises(ValueError, match="Give ScaledRows a method `copy_experts"):
        keras_moe.grow(trained(SparseMoE(4, k=2, experts=ScaledRows(4))), 8)
    layer = trained(SparseMoE(4, k=2, experts=ScaledRowsByExpert(4)))
    np.testing.assert_allclose(keras_moe.grow(layer, 8, k=4)(X), layer(X), rtol=1e-5, atol=1e-5)
    scales = arrays(layer.experts)
    assert_same(arrays(keras_moe.prune(layer, [2, 0, 3]).experts), [scales[i] for i in (2, 0, 3)])


def test_experts_of_a_cloned_layer_and_shared_experts_are_copied():
    expert = keras.layers.Dense(WIDTH, "tanh")
    layer = trained(SparseMoE(3, k=2, experts=expert, num_shared_experts=1))
    np.testing.assert_allclose(keras_moe.grow(layer, 6, k=4)(X), layer(X), rtol=1e-5, atol=1e-5)
    pruned = keras_moe.prune(layer, [2, 0])
    assert_same(arrays(pruned.shared_experts), arrays(layer.shared_experts))
    for new, origin in zip(pruned.experts.layers, [2, 0], strict=True):
        assert_same(arrays(new), arrays(layer.experts.layers[origin]))
