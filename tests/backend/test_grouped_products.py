"""Products of every expert's own rows, in each of the ways there are."""

import contextlib
import itertools
import os
import subprocess
import sys
from unittest import mock

import hypothesis
import keras
import numpy as np
import pytest
import tensorflow as tf
from combinations import covering
from helpers import (
    assert_agrees,
    examples,
    random_hierarchical,
    spoil_other_experts,
    value_and_gradients,
    with_random_weights,
)
from hypothesis import strategies as st

from keras_moe import NoisyTopKGating, SparseMoE
from keras_moe.backend.tensorflow import devices, loops, one_example, onednn, places
from keras_moe.backend.tensorflow import grouped_products as grouped
from keras_moe.dispatch.products import product


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    rows_per_expert=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    rest=st.integers(0, 3),
    way=st.sampled_from(["CPU, even", "CPU, uneven", "GPU, even", "GPU, uneven", "static shapes"]),
    by_onednn=st.booleans(),
)
def test_every_way_multiplies_each_row_by_the_matrix_of_its_expert(
    rows_per_expert, rest, way, by_onednn
):
    num_experts = len(rows_per_expert)
    expert = np.repeat(np.arange(num_experts), rows_per_expert)
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(len(expert) + rest, 3)), rng.normal(size=(num_experts, 3, 2))
    y, d_x, d_kernel = np.zeros((len(x), 2)), np.zeros_like(x), np.zeros_like(kernel)
    for i, e in enumerate(expert):
        y[i] = x[i] @ kernel[e]
        slope = np.cos(y[i])  # of the sum of sin(y)
        d_x[i], d_kernel[e] = kernel[e] @ slope, d_kernel[e] + np.outer(x[i], slope)

    counts = tf.constant(rows_per_expert)
    # Where there are no rows at all there are no places either.
    even, static = tf.constant(", even" in way and len(expert) > 0), way == "static shapes"
    with (
        devices.choosing(int("GPU" in way)),
        mock.patch.object(loops, "is_even", lambda _: even),
        # Copies that cost nothing make further blocks; a fortune, a single batch.
        mock.patch.object(places, "_COPY", 0 if "uneven" in way else 10**6),
        mock.patch.object(onednn, "is_in_use", lambda: by_onednn),
    ):
        received, gradients = value_and_gradients(
            lambda rows, kernel: product(rows, kernel, counts, static_shapes=static),
            tf.constant(x, tf.float32),
            tf.constant(kernel, tf.float32),
        )
    for ours, oracle in zip((received, *gradients), (y, d_x, d_kernel), strict=True):
        assert not isinstance(ours, tf.IndexedSlices)
        np.testing.assert_allclose(ours, oracle, rtol=1e-4, atol=1e-5)


def test_tensorflow_tells_whether_it_multiplies_by_onednn():
    # With another TensorFlow this says at once what `onednn.py` has to be checked for.
    received = subprocess.run(
        [
            sys.executable,
            "-c",
            "from keras_moe.backend.tensorflow import onednn; print(onednn.is_in_use())",
        ],
        env={**os.environ, "TF_ENABLE_ONEDNN_OPTS": "0"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert received.stdout == "False\n"


def test_a_product_of_one_row():
    row, kernel = tf.constant([[1.0, 2.0]]), tf.constant([[3.0, 4.0, 5.0], [6.0, 7.0, 8.0]])
    # 1·3 + 2·6 = 15, 1·4 + 2·7 = 18, 1·5 + 2·8 = 21
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        y = one_example.row_times(tf.cast(row, dtype), kernel)
        assert y.dtype == dtype
        np.testing.assert_array_equal(tf.cast(y, "float32"), [[15, 18, 21]])


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("gpu", [False, True])
def test_a_row_that_is_not_finite_spoils_its_own_expert_alone(gpu, even, monkeypatch):
    monkeypatch.setattr(loops, "is_even", lambda _: tf.constant(even))
    monkeypatch.setattr(places, "_COPY", 10**6 if even else 0)
    rows, kernel = np.ones((4, 2), "float32"), tf.ones((3, 2, 2))
    rows[2] = np.nan  # of expert 1, whose neighbours have more places than rows in a batch
    with devices.choosing(int(gpu)):
        y, (d_rows, d_kernel) = value_and_gradients(
            lambda rows, kernel: product(rows, kernel, tf.constant([1, 2, 1])),
            tf.constant(rows),
            kernel,
        )
    for ours in (y, d_rows):
        np.testing.assert_array_equal(np.isnan(ours).any(axis=1), [False, False, True, False])
    np.testing.assert_array_equal(np.isnan(d_kernel).any(axis=(1, 2)), [False, True, False])


@pytest.mark.parametrize(
    ("rows_per_expert", "even"),
    [
        ([64, 60, 87, 45], True),  # 1.2·87 = 104.4, and 64 + 50 = 114
        ([64, 60, 100, 32], False),  # 120, and 64 + 50
        ([0, 0, 0, 50], True),  # few rows: 60, and 12.5 + 50
        ([500, 540, 510, 498], False),  # many: 648, and 512 + 50
        ([0, 0, 0, 0], False),
    ],
)
def test_even_are_loads_whose_places_cost_less_than_copies(rows_per_expert, even):
    assert bool(loops.is_even(tf.constant(rows_per_expert))) == even


@pytest.mark.parametrize("gpu", [False, True])
def test_parameters_of_rows_and_their_gradient(gpu):
    bank, counts = tf.constant([[1.0], [2.0], [3.0]]), tf.constant([2, 0, 1])
    with devices.choosing(int(gpu)), tf.GradientTape() as tape:
        tape.watch(bank)
        layout = grouped.lay_out(counts, 5)
        y = grouped.restore(grouped.of_rows(bank, layout), layout)
    np.testing.assert_array_equal(y, [[1], [1], [3], [0], [0]])  # Two rows of no expert.
    upstream = tf.constant([[1.0], [10.0], [100.0], [np.nan], [1000.0]])
    with devices.choosing(int(gpu)):
        gradient = tape.gradient(y, bank, output_gradients=upstream)
    np.testing.assert_array_equal(gradient, [[11], [0], [100]])


@covering(
    # Half of them, in which every three arguments have all their combinations.
    usual=[
        (("every example", "three of four")[(training + gpu + even) % 2], training, gpu, even)
        for training, gpu, even in itertools.product([False, True], repeat=3)
    ],
    mask={"every example": None, "three of four": np.arange(24) % 4 > 0},
    training=[True, False],
    gpu=[False, True],
    even=[True, False],
)
def test_a_layer_agrees_with_the_oracle_every_way(mask, training, gpu, even, monkeypatch):
    monkeypatch.setattr(loops, "is_even", lambda _: tf.constant(even))
    monkeypatch.setattr(places, "_COPY", 10**6 if even else 0)
    layer = SparseMoE(5, [4, 3], k=2, activation="swiglu", use_bias=True, seed=5)
    with devices.choosing(int(gpu)):
        assert_agrees(with_random_weights(layer), examples(), training=training, mask=mask)
        # Its secondary gating multiplies the same way.
        layer = random_hierarchical(3, 4, 5, k=(2, 2), seed=5)
        assert_agrees(layer, examples(), training=training, mask=mask)


@pytest.mark.parametrize("policy", ["float64", "bfloat16", "mixed_float16"])
def test_both_ways_compute_in_the_dtype_of_the_layer(policy, monkeypatch):
    def answer(even):
        monkeypatch.setattr(loops, "is_even", lambda _: tf.constant(even))
        gating = NoisyTopKGating(5, k=2, noise=False)
        layer = SparseMoE(5, 4, gating=gating, use_bias=True, recompute=True, dtype=policy)
        with_random_weights(layer)
        weights = [weight.value for weight in layer.experts.trainable_weights]
        x = keras.ops.cast(examples(), layer.compute_dtype)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        assert y.dtype == layer.compute_dtype
        gradients = tape.gradient(y, [x, *weights], output_gradients=tf.ones_like(y))
        return [np.asarray(value, "float64") for value in (y, *gradients)]

    # Sums in another order: as far apart as the rounding of the dtype.
    unit = {"float64": 1e-13, "bfloat16": 2e-2, "mixed_float16": 3e-3}[policy]
    for batched, looped in zip(answer(True), answer(False), strict=True):
        np.testing.assert_allclose(looped, batched, rtol=unit, atol=unit * np.abs(batched).max())


def test_the_weights_of_other_experts_are_left_alone():
    layer = SparseMoE(80, 512, k=2)
    layer.build((None, 256))
    layer.gating.gate_kernel.assign(np.random.default_rng(0).normal(size=(256, 80)))
    x = np.random.default_rng(1).normal(size=(2, 256)).astype("float32")
    sound = layer(x)
    spoil_other_experts(layer, x)
    np.testing.assert_array_equal(layer(x), sound)


WAYS = ["CPU", "GPU", "GPU, further blocks", "either"]


@pytest.mark.cpu  # Gates rounded otherwise, over the step, are more than the tolerance.
@covering(
    usual=[
        *((True, False, way) for way in WAYS),
        *((False, False, way) for way in WAYS),
        *((True, True, "CPU"), (False, True, "GPU, further blocks"), (False, True, "either")),
    ],
    training=[True, False],
    in_graph=[False, True],
    way=WAYS,
)
def test_gradients_have_gradients(training, in_graph, way, monkeypatch):
    monkeypatch.setattr(places, "_COPY", 0 if "further" in way else 10**6)
    gating = NoisyTopKGating(5, k=2, noise=False)
    layer = SparseMoE(5, 4, gating=gating, activation="tanh", dtype="float64")
    with_random_weights(layer)
    x = tf.constant(examples(), tf.float64)
    direction = tf.constant(np.random.default_rng(1).normal(size=x.shape))

    def penalty(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            total = tf.reduce_sum(layer(x, training=training) ** 2)
        return tf.reduce_sum(tape.gradient(total, x) ** 2)

    def slope(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = penalty(x)
        return tf.reduce_sum(tape.gradient(value, x) * direction)

    # The central difference errs by the square of its step, times a third derivative, and by the
    # rounding of the gates, which are float32, over the step.
    step = 1e-4
    expected = (penalty(x + step * direction) - penalty(x - step * direction)) / (2 * step)
    with contextlib.nullcontext() if way == "either" else devices.choosing(int("GPU" in way)):
        received = (tf.function(slope) if in_graph else slope)(x)
    np.testing.assert_allclose(received, expected, rtol=1e-4)
