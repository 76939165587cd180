"""What `benchmarks/gpu.py` measures on JAX does the work that it is said to do."""

import contenders_jax
import gpu_contenders
import jax
import numpy as np
import pytest
from cases import Case
from contenders import JAX

CASE = Case(4, 2, 16, width=8, hidden_units=6)


@pytest.mark.parametrize("work", ["gradients", "forward", "step"])
def test_contenders_compute(work):
    case = CASE._replace(work=work)
    contenders = [each for each in gpu_contenders.of(case) if each.module == JAX]
    for contender in contenders:
        try:
            step = getattr(contenders_jax, contender.function)(case, **contender.options)
        except ModuleNotFoundError as error:
            assert error.name == "tokamax"
            continue
        first, second = step(), step()
        outputs = jax.tree.leaves(second)
        assert all(np.all(np.isfinite(output)) for output in outputs), contender.name
        if work == "gradients":  # Of x and of two kernels at least, none of them zero.
            assert sum(bool(np.any(output)) for output in outputs) >= 4, contender.name
        if work == "step":  # Another batch does not come, but other weights do.
            (_, (y, _)), (_, (after, _)) = first, second
            assert np.any(np.asarray(y) != np.asarray(after)), contender.name
