"""Presets with a gating of one's own."""

import dataclasses
import functools

import pytest

from keras_moe import HierarchicalGating, HierarchicalMoE, NoisyTopKGating, SparseMoE
from keras_moe.models import PRESETS, TRANSLATION_PRESETS


@pytest.mark.parametrize("preset", [PRESETS["MoE-4"], TRANSLATION_PRESETS["MoE-32"]])
def test_a_class_or_function_makes_the_gating_of_each_mixture(preset):
    function = functools.partial(NoisyTopKGating, noise_epsilon=0.5)
    flat = dataclasses.replace(preset, gating=function, num_experts=6, k=3).scaled(8)
    one, other = flat.make_middle(), flat.make_middle()
    assert type(one) is SparseMoE
    assert one.gating is not other.gating
    config = one.gating.get_config()
    assert (config["num_experts"], config["k"], config["noise_epsilon"]) == (6, 3, 0.5)

    groups = {"num_experts": 6, "num_groups": 2, "k": (1, 3), "gating": HierarchicalGating}
    layer = dataclasses.replace(preset, **groups).scaled(8).make_middle()
    assert type(layer) is HierarchicalMoE
    sizes = layer.gating.num_groups, layer.gating.experts_per_group, layer.gating.k
    assert sizes == (2, 3, (1, 3))
