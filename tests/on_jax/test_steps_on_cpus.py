"""What XLA makes of a training step on a CPU: no copies of what is large, no sorting of rows."""

import re

import jax
import pytest
from training_steps import compiled_step

N, K, T, D, F = 64, 2, 128, 64, 128
OF_BANKS = 2 * N * D * F * 4  # bytes


@pytest.fixture(scope="module")
def step():
    return compiled_step(N, F, K, T, D)


def test_banks_are_not_copied_before_the_loops_that_read_them(step):
    text = step.as_text()
    whole = rf"f32\[{N},({D},{F}|{F},{D})\]"
    assert re.search(rf"= {whole}\S* (dot|while|fusion|get-tuple-element)\(", text)
    assert not re.search(rf"= {whole}\S* copy\(", text)


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10),
    reason="the XLA of JAX 0.6 joins what the barrier parts, and keeps the squares",
)
def test_gradients_are_all_that_a_step_has_in_the_size_of_the_banks(step):
    # Their squares would be half as much again. Rows, at 2·T·K·(D + F)·4 bytes, are a tenth.
    assert OF_BANKS <= step.memory_analysis().temp_size_in_bytes < 1.4 * OF_BANKS


def test_the_best_of_a_row_are_found_without_sorting_it(step):
    text = step.as_text()
    assert 'custom_call_target="TopK"' in text
    assert not re.search(rf"f32\[{T},{N}\]\S* .*sort\(", text)
