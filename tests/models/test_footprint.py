"""`footprint`, beside both columns of the paper's tables, and beside a count by hand."""

import resource

import keras
import pytest
from reference_tables import PRINTED_7, PRINTED_8

from keras_moe import HierarchicalMoE, SparseMoE
from keras_moe.models import (
    TABLE_7,
    TABLE_8,
    TRANSLATION_PRESETS,
    LanguageModel,
    Preset,
    TranslationModel,
    footprint,
)

ROWS = [
    *((TABLE_7[name], *printed) for name, printed in PRINTED_7.items()),
    *((TABLE_8[name], *printed) for name, printed in PRINTED_8.items()),
]
NAMES = [*(f"Table 7 {name}" for name in PRINTED_7), *(f"Table 8 {name}" for name in PRINTED_8)]


def test_every_row_has_a_preset():
    assert list(TABLE_7) == list(PRINTED_7)
    assert list(TABLE_8) == list(PRINTED_8)


@pytest.mark.parametrize(("preset", "operations", "parameters"), ROWS, ids=NAMES)
def test_a_preset_is_as_large_as_the_paper_prints(preset, operations, parameters):
    counted = footprint(preset)
    assert counted.ops_per_timestep / 1e6 == pytest.approx(operations, abs=0.05)
    assert counted.parameters / 1e6 == pytest.approx(parameters, abs=0.05)


def test_terms_of_one_row():
    # Two LSTMs of (512 + 512)·4·512; gating and noise of 16 groups, and of 2 groups of 16 experts;
    # 2·2 experts of 2·512·1024. Parameters: all 16·16 secondary columns, all experts, and biases.
    lstms, expert = 2 * 1024 * 4 * 512, 2 * 512 * 1024
    operations = lstms + 2 * 512 * (16 + 2 * 16) + 4 * expert
    parameters = lstms + 2 * 4 * 512 + 2 * 512 * (16 + 256) + 256 * expert
    assert footprint("MoE-256-h") == (operations, parameters)


# Both in millions: what Tables 2, 3 and 5 print, cut off as in Table 7.
@pytest.mark.parametrize(
    ("name", "operations", "parameters"), [("MoE-2048", 85, 8700), ("multilingual", 102, 8700)]
)
def test_a_translation_preset_is_as_large_as_the_paper_prints(name, operations, parameters):
    counted = footprint(TRANSLATION_PRESETS[name])
    assert counted.ops_per_timestep // 10**6 == operations
    assert counted.parameters / 1e6 == pytest.approx(parameters, abs=50)


def test_terms_of_a_translation_preset():
    # Five LSTMs of 2048 units with 512 inputs, projected to 512, one of which also reads the 512 of
    # the context; attention U and W; 4 experts of each mixture, and its gating without noise; the
    # softmax. Parameters: also biases, v, thresholds, and two embeddings.
    lstms = 5 * ((512 + 512) * 4 * 2048 + 2048 * 512) + 512 * 4 * 2048
    expert, vocabulary = 2 * 512 * 2048, 32_000 * 512
    shared = lstms + 2 * 512 * 512 + 2 * 512 * 32 + vocabulary
    biases = 5 * 4 * 2048 + 512 + 2 * 32 + 32_000
    assert footprint(TRANSLATION_PRESETS["MoE-32"]) == (
        shared + 2 * 4 * expert,
        shared + 2 * 32 * expert + biases + 2 * vocabulary,
    )


def test_a_built_translation_model_has_the_parameters_that_keras_counts():
    model = TranslationModel(30, 8, SparseMoE(6, 12, k=2), num_lstms=(4, 1))
    model.build(None)
    trainable = sum(int(keras.ops.size(weight)) for weight in model.trainable_weights)
    assert footprint(model).parameters == trainable


def test_parameters_by_the_hundred_billion_take_no_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    parameters = footprint("MoE-131072-h").parameters
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # In float32 they would be 550 GB.
    assert parameters > 137e9
    assert after - before < 200_000  # KB


@pytest.mark.parametrize(
    "middle",
    [
        SparseMoE(6, 12, k=2),
        HierarchicalMoE(2, 3, 12, (1, 2)),
        SparseMoE(6, 12, k=2, use_bias=True),
    ],
    ids=["flat", "hierarchical", "biases"],
)
def test_a_built_model_has_the_parameters_that_keras_counts(middle):
    model = LanguageModel(30, 8, middle)
    model.build((None, None))
    others = model.embedding.count_params() + model.softmax.count_params()
    trainable = sum(int(keras.ops.size(weight)) for weight in model.trainable_weights)
    assert footprint(model).parameters == trainable - others


def test_shared_experts_count():
    # Two LSTMs of (8 + 8)·4·8, gating and noise of 6 experts, 2 experts chosen and 3 shared.
    model = LanguageModel(30, 8, SparseMoE(6, 12, k=2, num_shared_experts=3))
    model.build((None, None))
    expert = 2 * 8 * 12
    assert footprint(model).ops_per_timestep == 2 * 16 * 32 + 2 * 8 * 6 + (2 + 3) * expert


def test_frozen_parts_count():
    model = LanguageModel(30, 8, SparseMoE(6, 12, k=2))
    model.build((None, None))
    counted = footprint(model)
    model.trainable = False
    assert footprint(model) == counted


@pytest.mark.parametrize("model", [LanguageModel, TranslationModel])
def test_a_model_without_weights_is_refused(model):
    with pytest.raises(ValueError, match="`model` must be built"):
        footprint(model(30, 8))


def test_an_unknown_name_is_refused_with_all_that_there_are():
    with pytest.raises(ValueError, match="MoE-4096-h.*Received: 'MoE-5'"):
        footprint("MoE-5")


def test_sizes_scale_with_the_width_and_stay_integers():
    assert TABLE_7["MoE-143M"].scaled(16) == Preset(
        width=16,
        lstm_units=64,
        num_experts=256,
        hidden_units=128,
        num_groups=16,
        k=(2, 2),
        dropout=0.4,
    )
    # 9·5/6 is no integer.
    with pytest.raises(ValueError, match=r"9 at width 6 would become 7\.5.*Received: width=5"):
        Preset(width=6, hidden_units=9).scaled(5)
