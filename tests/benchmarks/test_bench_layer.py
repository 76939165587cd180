"""The benchmark of the layer runs from the command line to the tables."""

import sys

import layer
import measure
import pytest
from cases import Case

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
SMALL = Case(4, 2, 64)


def test_the_tables_hold_what_was_measured(tmp_path, capsys):
    outcomes = layer.main(
        ["--tables", "gradients", "--cells", "4,2,64", "--contenders", "keras_moe", "--rounds", "2"]
        + ["--output", str(tmp_path)]
    )
    assert set(outcomes) == {SMALL} and set(outcomes[SMALL]) == {"dense", "keras_moe"}
    ours = outcomes[SMALL]["keras_moe"]
    assert len(ours.seconds) == 2
    # At least the weights of 4 experts, 2·512·1024 floats each, and as many gradients.
    assert ours.peak_bytes > 2 * 4 * 2 * 512 * 1024 * 4
    table = (tmp_path / "layer.md").read_text()
    # Of two ratios the median is the mean, and the quartiles lie a quarter from either.
    low, high = sorted(ours.ratios)
    quarter = (high - low) / 4
    expected = f"{(low + high) / 2:.2f} ({low + quarter:.2f}–{high - quarter:.2f})"
    assert f"| keras_moe | {expected} |" in table
    assert table.strip() == capsys.readouterr().out.strip()


def test_the_tables_name_contenders_that_exist():
    named = {name for table in layer.make_tables([]).values() for name in table.contenders}
    assert named == {other.name for other in layer.OTHERS}


def test_a_contender_that_fails_says_why_and_the_others_are_measured():
    absent = measure.Contender("absent", "no_such_module", "make")
    outcomes = measure.measure(SMALL, layer.DENSE, [absent], rounds=1)
    assert outcomes["absent"].failure == "not installed: no_such_module"
    assert outcomes["dense"].ratios == [1.0]
