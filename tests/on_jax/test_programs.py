"""What XLA makes of a mixture: the operations of the compiled program."""

import importlib.util

import jax
import numpy as np
import pytest
from programs import Program

from keras_moe import SparseMoE
from keras_moe.backend.jax import loops

N, K, T, D, F = 16, 2, 512, 32, 64
ROWS = K * T
# The experts alone: of each row a pair of products, 2 operations for each pair of numbers. The
# backward pass has twice as many, gradients of rows and of kernels.
OF_EXPERTS = {"forward": 4 * ROWS * D * F, "gradients": 12 * ROWS * D * F}
# The gating has N columns for the logits, and in training N for the noise: 2·D·2·N for each
# example, and up to three times that with its gradients.
OF_GATING = {"forward": 4 * T * D * N, "gradients": 12 * T * D * N}


def lowered(work, device=None):
    """A layer's forward pass of training, or with all gradients, for a device."""
    layer = SparseMoE(N, F, K, seed=0)
    layer.build((None, D))
    state = layer.trainable_variables, layer.non_trainable_variables

    def loss(weights, x, others):
        y, _, losses = layer.stateless_call(weights, others, x, training=True, return_losses=True)
        return y.sum() + sum(losses)

    sharding = device and jax.sharding.SingleDeviceSharding(device)

    def spec(value):
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)

    weights, others = (jax.tree.map(spec, [v.value for v in part]) for part in state)
    function = loss if work == "forward" else jax.grad(loss, argnums=(0, 1))
    x = jax.ShapeDtypeStruct((T, D), "float32", sharding=sharding)
    return jax.jit(function).lower(weights, x, others)


@pytest.mark.parametrize("work", OF_EXPERTS)
def test_a_cpu_computes_at_most_2_2_times_the_rows_of_the_chosen_experts(work):
    # Pieces of 72 rows, which all loads of 72 and below fill in one. The most there can be: each
    # expert has less than a piece that isn't full.
    size = loops.piece_size(ROWS, N)
    assert size == 72
    most = ROWS // size + N
    compiled = lowered(work).compile().as_text()
    found = Program(compiled, turns=most).operations()
    # Of the gradients of kernels the first pieces, one for each expert, are a loop of their own.
    twice = {"forward": 0, "gradients": 4 * N * size * D * F}[work]
    assert found - twice <= 2.2 * OF_EXPERTS[work] + OF_GATING[work]
    # And these are all: none is taken apart into what the count doesn't know.
    assert found >= OF_EXPERTS[work]


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu, of `pip install keras_moe[tpu]`, which `make test` doesn't install",
)
@pytest.mark.parametrize("work", OF_EXPERTS)
@pytest.mark.parametrize("topology", ["v5e:2x2", "v4:2x2x1"])
def test_a_tpu_computes_at_most_2_2_times_the_rows_of_the_chosen_experts(topology, work):
    from tpu_programs import make_topology

    compiled = lowered(work, make_topology(topology)[0]).compile().as_text()
    assert "ragged-dot" not in compiled
    found = Program(compiled).operations()
    assert OF_EXPERTS[work] <= found <= 2.2 * OF_EXPERTS[work] + OF_GATING[work]


def test_operations_of_loops_and_branches():
    def repeated(x, w):
        return jax.lax.scan(lambda x, _: (x @ w, None), x, length=7)[0]

    x, w = np.ones((4, 8), "float32"), np.ones((8, 8), "float32")
    program = Program(jax.jit(repeated).lower(x, w).compile().as_text())
    assert program.operations() == 7 * 2 * 4 * 8 * 8

    def as_often_as_told(x, w, n):
        return jax.lax.fori_loop(0, n, lambda _, x: x @ w, x)

    text = jax.jit(as_often_as_told).lower(x, w, 3).compile().as_text()
    assert Program(text, turns=5).operations() == 5 * 2 * 4 * 8 * 8
