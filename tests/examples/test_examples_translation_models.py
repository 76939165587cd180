"""What the command line changes of a preset of the translation models."""

import argparse

import pytest
import translation_models
from normalized_gating import NormalizedGating

from keras_moe import HierarchicalGating, NoisyTopKGating
from keras_moe.gating.strictly_balanced import StrictlyBalancedGating


def made(preset, **options):
    defaults = {name.replace("-", "_"): value for name, value, _ in translation_models.OPTIONS}
    args = argparse.Namespace(**{**defaults, "width": 8, "seed": 0, **options})
    return translation_models.make_model(preset, 50, args)


def mixtures(model):
    return model.encoder_middle, model.decoder_middle


@pytest.mark.parametrize(
    "preset, gating, kind, k",
    [
        ("MoE-32", "preset", StrictlyBalancedGating, 4),
        ("MoE-32", "noisy_top_k", NoisyTopKGating, 4),
        ("multilingual", "preset", NoisyTopKGating, 2),
        ("multilingual", "strictly_balanced", StrictlyBalancedGating, 2),
        ("multilingual", "normalized", NormalizedGating, 2),
        ("MoE-512", "noisy_top_k", HierarchicalGating, (2, 2)),
    ],
)
def test_the_gating_alone_is_another(preset, gating, kind, k):
    for mixture in mixtures(made(preset, gating=gating)):
        assert type(mixture.gating) is kind
        assert mixture.k == k
        # The paper's 2048 and 8192 at width 512.
        assert mixture.experts.hidden_units == [128 if preset == "multilingual" else 32]


def test_numbers_are_the_presets_unless_named():
    for mixture in mixtures(made("multilingual")):
        assert (mixture.num_experts, mixture.k) == (512, 2)
        assert mixture.importance_loss_weight == mixture.load_loss_weight == 0.01
    changed = made("multilingual", num_experts=6, k=3, balance_loss_weight=0.5)
    for mixture in mixtures(changed):
        assert (mixture.num_experts, mixture.k) == (6, 3)
        assert mixture.importance_loss_weight == mixture.load_loss_weight == 0.5


def test_the_baseline_has_no_mixture_to_change():
    model = made("no-experts", num_experts=6, k=3, gating="noisy_top_k")
    assert mixtures(model) == (None, None)


@pytest.mark.parametrize(
    "preset, options, message",
    [
        ("MoE-33", {}, "one of no-experts, MoE-32.*Received: 'MoE-33'"),
        ("MoE-32", {"gating": "noisy"}, "`gating` must be.*Received: 'noisy'"),
        ("MoE-32", {"k": 33}, "between 1 and `num_experts`. Received: k=33"),
        ("MoE-512", {"k": 4}, "must be a pair of integers.*Received: 4"),
        ("MoE-512", {"gating": "normalized"}, "must have the same `num_experts`"),
    ],
)
def test_what_there_is_not_is_refused(preset, options, message):
    with pytest.raises(ValueError, match=message):
        made(preset, **options)
