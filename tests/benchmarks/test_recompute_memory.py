"""Recomputation saves the memory that its formula says."""

import pathlib
import runpy
import sys

import pytest

BENCHMARK = pathlib.Path(__file__).parents[2] / "benchmarks" / "recompute_memory.py"


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_recomputation_saves_the_hidden_activations_of_all_layers_but_one():
    saved, formula = runpy.run_path(str(BENCHMARK))["main"]()
    # Measured are 0.92 to 0.96 of it; memory comes in pages, and not all goes back at once.
    assert saved > 0.8 * formula
