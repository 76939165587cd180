"""What XLA makes of a mixture: the operations of the compiled program."""

import dataclasses
import importlib.util

import jax
import keras
import numpy as np
import pytest
import tpu_formulas
import tpu_models
import tpu_programs
from programs import Program

from keras_moe import SparseMoE
from keras_moe.backend.jax import loops
from keras_moe.models.presets import PRESETS

N, K, T, D, F = 16, 2, 512, 32, 64
ROWS = K * T
# The experts alone: of each row a pair of products, 2 operations for each pair of numbers. The
# backward pass has twice as many, gradients of rows and of kernels.
OF_EXPERTS = {"forward": 4 * ROWS * D * F, "gradients": 12 * ROWS * D * F}
# The gating has N columns for the logits, and in training N for the noise: 2·D·2·N for each
# example, and up to three times that with its gradients.
OF_GATING = {"forward": 4 * T * D * N, "gradients": 12 * T * D * N}


@pytest.fixture
def libtpu(monkeypatch):
    """Skips a test without libtpu, which ends the process for a flag of CPUs in `XLA_FLAGS`."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu, of `pip install keras_moe[tpu]`, which `make test` leaves out")
    jax.devices()  # CPUs have read their flags by now.
    monkeypatch.delenv("XLA_FLAGS", raising=False)


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


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize("work", OF_EXPERTS)
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2", "v4:2x2x1"])
def test_a_tpu_computes_at_most_2_2_times_the_rows_of_the_chosen_experts(topology, work):
    device = tpu_programs.make_topology(topology)[0]
    _, text = tpu_programs.compile_step(lowered(work, device))
    assert "ragged-dot" not in text
    found = Program(text).operations()
    assert OF_EXPERTS[work] <= found <= 2.2 * OF_EXPERTS[work] + OF_GATING[work]


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize("capacity", [1.25, None])
def test_a_step_of_several_tpus_sends_no_experts(capacity, monkeypatch):
    small = dataclasses.replace(PRESETS["MoE-256-h"].scaled(128), num_experts=16, num_groups=4)
    monkeypatch.setattr(tpu_models, "VOCABULARY", 200)
    monkeypatch.setattr(tpu_models, "SENTENCES", 24)  # and 384 rows in a round, as no kernel has
    found = tpu_programs.measure(small, capacity, tpu_programs.make_topology("v6e:2x2"))
    operations, arguments, _ = found.expected
    assert 1 <= found.operations / operations <= 2.2
    # Small variables are filled up to tiles.
    assert 1 <= found.arguments / arguments < 1.2
    assert found.kernels == 0
    assert "all-to-all" in {name for name, _, _ in found.collectives}


@pytest.mark.skipif(
    tuple(map(int, keras.__version__.split(".")[:2])) < (3, 15),
    reason="tpu_programs.py makes variables without values by methods that Keras 3.15 has",
)
def test_the_formulas_of_a_chip():
    model, _ = tpu_programs.build("MoE-256", 1.25, jax.devices()[:8])
    experts = 256 // 8 * 2 * 512 * 1024
    means = 256 // 8 * 2 * (512 + 1024)  # the factored slots
    lstms = 2 * (4 * (512 + 512) * 512 + 4 * 512)
    gating, words = 2 * 512 * 256, 128 * 32
    rest = lstms + gating + 20_000 * (2 * 512 + 1)  # embedding and softmax

    per_word = 2 * 4 * (512 + 512) * 512 + gating + 4 * 2 * 512 * 1024 + 512 * 20_000
    assert tpu_formulas.operations("MoE-256", model) == 3 * 2 * words * per_word
    # All else has two slots. Then words and targets, and numbers as the thresholds of experts, what
    # the balance metrics have seen, seeds and counters.
    least = experts + means + 3 * rest + 2 * words
    assert least <= tpu_formulas.arguments("MoE-256", model, 8) / 4 < least + 10 * 256
    # Two LSTMs have 4 gates, memory and input of each word; 4 results; 1.25 · 4 places with
    # 512 numbers of a row, 1024 hidden ones and a result. The logits are more than the gradients
    # of what is at these places.
    needed = words * (2 * 6 * 512 + 4 * 512 + 5 * (512 + 1024 + 512))
    found = tpu_formulas.temporaries("MoE-256", model, 8)
    assert found == 4 * (experts + rest + needed + words * 20_000)


def convolution(given, kernel, result, how):
    """The text of a program of one convolution, operands and result by their shapes."""
    return f"""
ENTRY %main (x: bf16[{given}], w: bf16[{kernel}]) -> bf16[{result}] {{
  %x = bf16[{given}]{{3,2,1,0}} parameter(0)
  %w = bf16[{kernel}]{{3,2,1,0}} parameter(1)
  ROOT %y = bf16[{result}]{{3,2,1,0}} convolution(%x, %w), {how}, metadata={{op_name="dot"}}
}}"""


@pytest.mark.parametrize(
    ("text", "operations"),
    [
        # A matrix [32, 16·6] for 8·4 rows: in each of the 16 places all but one are of padding.
        (
            convolution(
                "8,4,32,1",
                "32,16,6,1",
                "8,4,16,6",
                "window={size=1x16 pad=0_0x15_15 rhs_reversal=0x1}, dim_labels=b0f1_i1o0->b01f",
            ),
            2 * 8 * 4 * 32 * 16 * 6,
        ),
        # A sum over 3 heads of 32, which is a window without padding.
        (
            convolution(
                "8,4,3,32", "3,32,6,1", "8,4,6,1", "window={size=1x3}, dim_labels=b01f_1io0->b0f1"
            ),
            2 * 8 * 4 * (3 * 32) * 6,
        ),
        # 4 products [5, 6] x [6, 7] and 3 of each of them: the rest of a window falls between.
        (
            convolution(
                "4,3,5,6",
                "4,3,6,7",
                "4,3,5,7",
                "window={size=4x3 stride=3x2 lhs_dilate=4x3}, dim_labels=01bf_01io->01bf",
            ),
            4 * 3 * (2 * 5 * 6 * 7),
        ),
        # The same, said by padding.
        (
            convolution(
                "4,3,5,6",
                "4,3,6,7",
                "4,3,5,7",
                "window={size=4x3 stride=4x3 pad=3_3x2_2 lhs_dilate=3x2 rhs_reversal=1x1}, "
                "dim_labels=01bf_01io->01bf",
            ),
            4 * 3 * (2 * 5 * 6 * 7),
        ),
    ],
    ids=["padded", "summed", "batch", "padded batch"],
)
def test_operations_of_products_as_tpus_have_them(text, operations):
    assert Program(text).operations() == operations


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
