"""Weak scaling: what replicas send, counted and by the formula; the plan on paper by hand."""

import dataclasses

import numpy as np
import pytest
import scaling
import scaling_plan
from reference_tables import PRINTED_8
from replicas import strategy

from keras_moe.models import TABLE_8, Preset, footprint

SIZE = scaling.Size(rows=256, width=16, hidden_units=8)
WITH_EXPERTS = [name for name, preset in TABLE_8.items() if preset.num_experts]


def measure(num_replicas, mode):
    measured = scaling.measure(strategy(num_replicas), mode, SIZE)
    assert measured.bytes_sent == measured.bytes_formula
    assert measured.rows_per_expert == measured.rows_formula
    assert measured.experts == 8 * num_replicas
    return measured


def test_bytes_and_rows_when_nothing_is_dropped():
    measured = measure(2, "dropless")
    # 2 choices of 256 rows on each of 8 experts. No less travels than all choices, four times.
    assert measured.rows_per_expert == 64
    assert 4 * 512 * 16 * 4 <= measured.bytes_sent < 1.2 * 4 * 512 * 16 * 4
    # 8 experts' numbers of rows for each of 2 replicas, int32.
    assert measured.bytes_of_counts == 64


def test_bytes_and_rows_stay_constant_in_static_shapes():
    two, four = measure(2, "static"), measure(4, "static")
    # 1.25 times the even share. Half or a quarter of it, and again a quarter of that, is a round.
    assert two.rows_per_expert == four.rows_per_expert == 80
    for measured in (two, four):
        rounds = measured.bytes_sent / (4 * 16 * 4) / (8 * 80 / 4)
        assert rounds == int(rounds) and rounds in (4, 5)


def test_rows_of_pairs_by_hand():
    # Two replicas with two examples each and two experts, both of which every example chooses, the
    # first one first. Of 3 places each, first choices of expert 0 take all three but that of the
    # last example, and so do second ones of expert 1.
    x = np.ones((2, 2, 1))
    pairs = scaling.rows_of_pairs(x, np.array([[2.0, 1.0]]), places=3)
    assert pairs.tolist() == [[2, 2], [1, 1]]
    assert scaling.rows_of_pairs(x, np.array([[2.0, 1.0]]), np.inf).tolist() == [[2, 2], [2, 2]]


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_formulas_count_what_models_have(name):
    counts, counted = scaling_plan.counts(TABLE_8[name]), footprint(TABLE_8[name])
    assert (counts.ops_per_timestep, counts.parameters) == counted
    operations, parameters = PRINTED_8[name]
    assert counts.ops_per_timestep / 1e6 == pytest.approx(operations, abs=0.05)
    assert counts.parameters / 1e6 == pytest.approx(parameters, abs=0.05)


def test_formulas_count_a_projection_and_several_hidden_layers():
    preset = Preset(width=4, lstm_units=8, num_experts=6, hidden_units=(3, 5), k=2)
    counts, counted = scaling_plan.counts(preset), footprint(preset)
    assert (counts.ops_per_timestep, counts.parameters) == counted


def test_a_plan_by_hand():
    preset = Preset(width=4, num_experts=8, hidden_units=3, num_groups=4, k=(2, 1), num_lstms=1)
    step = scaling_plan.plan(preset, devices=2, words=10)
    # Mirrored: the LSTM's (4 + 4)·16 + 16 and the primary gating's 2·4·4. Divided by two: the
    # secondary gatings' 2·4·8, and 8 experts of 4·3 + 3·4.
    mirrored, secondary, experts = 144 + 32, 32, 96
    assert step.parameters == step.gradients == 4 * (mirrored + secondary + experts)
    # Two moments; of each of 4 experts means of 4 rows and 3 columns, and of 3 rows and 4 columns.
    assert step.slots == 4 * (2 * (mirrored + secondary) + 4 * 14)
    # 2 experts for each word. Rows and results, where they come from and where they go.
    assert step.rows == 4 * 10 * 2 * 4 * 4
    assert step.memory == step.parameters + step.gradients + step.slots + step.rows
    # Half stays: 2 rows and results of 4 numbers and their gradients; for the gating 2 rows of 4
    # and logits of 2 experts and of their noise, and gradients.
    assert step.exchanged == 4 * 10 * (2 * 16 + 2 * 2 * (4 + 4)) / 2
    assert step.reduced == 4 * 2 * mirrored / 2
    # The LSTM's matrices, both gatings with noise, 2 experts, and twice that backwards.
    assert step.operations == 3 * 10 * (128 + 32 + 2 * 16 + 2 * 24)
    assert step.operations_per_byte == 2 * step.operations / (step.exchanged + step.reduced)


def test_computation_over_communication_is_the_hidden_size():
    # Section 3.2: a row of 512 numbers and its result, and two products of 512·F between them.
    for name in WITH_EXPERTS:
        assert scaling_plan.intensity(TABLE_8[name]) == 1024
    wide = dataclasses.replace(TABLE_8["MoE-32"], hidden_units=8192)
    assert scaling_plan.intensity(wide) == 8192


def test_a_billion_parameters_fit_on_12_gb():
    # Appendix D. As many on each device: the largest model of Table 8 takes 128.
    assert 1.0e9 < scaling_plan.counts(TABLE_8["MoE-1024-h"]).parameters < 1.1e9
    assert scaling_plan.plan(TABLE_8["MoE-1024-h"], 1).memory < 12e9
    assert scaling_plan.plan(TABLE_8["MoE-131072-h"], 128).memory < 12e9
    assert scaling_plan.plan(TABLE_8["MoE-131072-h"], 64).memory > 12e9


def test_a_trillion_parameters_on_1024_devices_as_a_billion_on_one():
    trillion = scaling_plan.with_experts(2**20, 1024)
    assert scaling_plan.counts(trillion).parameters > 1e12
    one, many = (
        scaling_plan.plan(preset, devices)
        for preset, devices in [(TABLE_8["MoE-1024-h"], 1), (trillion, 1024)]
    )
    assert many.memory == pytest.approx(one.memory, rel=0.01)


def test_devices_that_cannot_hold_as_many_groups_each_are_refused():
    with pytest.raises(ValueError, match="Received: 32 and 64 devices"):
        scaling_plan.plan(TABLE_8["MoE-1024-h"], 64)


def test_tables(capsys):
    row = scaling.Measured(2, 16, 2048.0, 2048.0, 64.0, 8.0, 8.0, 0.5)
    scaling.print_measured({"dropless": [row]}, SIZE)
    assert "| 2 | 16 | 2 | 2 | 1 | 0.1 | 8 | 8 | 500 |" in capsys.readouterr().out
