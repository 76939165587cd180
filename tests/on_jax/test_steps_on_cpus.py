"""What XLA makes of a training step on a CPU: no copies of what is large, no sorting of rows."""

import re

import jax
import pytest

from keras_moe import SparseMoE
from keras_moe.optimizers import FactoredAdam

N, K, T, D, F = 64, 2, 128, 64, 128
OF_BANKS = 2 * N * D * F * 4  # bytes


@pytest.fixture(scope="module")
def step():
    """A compiled step, which writes new weights over the old ones."""
    layer, optimizer = SparseMoE(N, F, K, seed=0), FactoredAdam()
    layer.build((None, D))
    optimizer.build(layer.trainable_variables)

    def train(state, x):
        weights, others, slots = state

        def loss(weights):
            y, new, losses = layer.stateless_call(
                weights, others, x, training=True, return_losses=True
            )
            return (y**2).mean() + sum(losses), new

        gradients, others = jax.grad(loss, has_aux=True)(weights)
        weights, slots = optimizer.stateless_apply(slots, gradients, weights)
        return weights, others, slots

    parts = layer.trainable_variables, layer.non_trainable_variables, optimizer.variables
    state = [[variable.value for variable in part] for part in parts]
    x = jax.ShapeDtypeStruct((T, D), "float32")
    return jax.jit(train, donate_argnums=0).lower(state, x).compile()


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
