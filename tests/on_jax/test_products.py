"""Grouped products of each way that a device may choose, against one expert after the other."""

import functools
from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np
import pytest

from keras_moe.backend.jax import grouped_products, loops, places, tpu_kernels

N, M, D, F = 5, 40, 3, 2
LOADS = {
    "even": [8, 8, 8, 8, 8],
    "uneven": [1, 20, 0, 12, 3],  # Four rows of nobody.
    "all to one": [0, 0, 40, 0, 0],
    "none": [0, 0, 0, 0, 0],
}


def in_places(rows, kernel, counts):
    return places.apply(jax.numpy.matmul, rows, counts, [kernel])


def by_products_in_places(rows, kernel, counts):
    """One after the other, as a GPU computes products that aren't an expert's."""
    with_cards = lambda *inputs, cuda, default, tpu: cuda(*inputs)  # noqa: E731
    with mock.patch("jax.lax.platform_dependent", with_cards):
        return chosen(rows, kernel, counts)


def chosen(rows, kernel, counts):
    layout = grouped_products.lay_out(counts, rows.shape[0])
    return grouped_products.multiply(rows, kernel, layout)


@jax.custom_vjp
def by_kernels(rows, kernel, counts):
    return tpu_kernels.times(rows, kernel, counts)


def _gradients_by_kernels(saved, upstream):
    rows, kernel, counts = saved
    of_rows = tpu_kernels.times(upstream, kernel, counts, transposed=True)
    return of_rows, tpu_kernels.gradient_of_kernel(rows, upstream, counts), None


by_kernels.defvjp(lambda *inputs: (by_kernels(*inputs), inputs), _gradients_by_kernels)


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels of TPUs, run by an interpreter of JAX."""
    megablox = SimpleNamespace(
        gmm=functools.partial(tpu_kernels.MEGABLOX.gmm, interpret=True),
        tgmm=functools.partial(tpu_kernels.MEGABLOX.tgmm, interpret=True),
    )
    monkeypatch.setattr(tpu_kernels, "MEGABLOX", megablox)


WAYS = {
    "chosen": chosen,
    "in places": in_places,
    "each product in places": by_products_in_places,
    "kernels of TPUs": by_kernels,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_products_and_gradients(way, interpreted):
    rng = np.random.default_rng(0)
    rows, kernel, upstream = (
        rng.normal(size=shape).astype("float32") for shape in ((M, D), (N, D, F), (M, F))
    )

    @jax.jit  # One program for all loads: no shape depends on them.
    def step(rows, kernel, counts, upstream):
        y, gradient = jax.vjp(lambda *inputs: way(*inputs, counts), rows, kernel)
        return y, *gradient(upstream)

    for load in LOADS.values():
        y, of_rows, of_kernel = step(rows, kernel, np.array(load, "int32"), upstream)
        wanted, begin = [np.zeros_like(x) for x in (y, rows, kernel)], 0
        for expert, number in enumerate(load):
            mine = slice(begin, begin + number)
            wanted[0][mine] = rows[mine] @ kernel[expert]
            wanted[1][mine] = upstream[mine] @ kernel[expert].T
            wanted[2][expert] = rows[mine].T @ upstream[mine]
            begin += number
        for received, expected in zip((y, of_rows, of_kernel), wanted, strict=True):
            np.testing.assert_allclose(received, expected, rtol=1e-5, atol=1e-5)


def test_vectorised_loops_go_through_the_kernels_of_tpus(interpreted):
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(2, M, D)).astype("float32")
    kernel = rng.normal(size=(N, D, F)).astype("float32")
    counts = np.array([LOADS["uneven"], LOADS["even"]], "int32")
    each = jax.jit(jax.vmap(tpu_kernels.times, (0, None, 0)))(rows, kernel, counts)
    for i, load in enumerate(counts):
        expert = np.repeat(np.arange(N), load)
        wanted = np.zeros((M, F), "float32")
        wanted[: len(expert)] = np.einsum("md,mdf->mf", rows[i, : len(expert)], kernel[expert])
        np.testing.assert_allclose(each[i], wanted, rtol=1e-5, atol=1e-5)


def test_kernels_of_tpus_are_exact_where_they_have_to_be(interpreted):
    """By products of bfloat16 alone, which has 8 bits, all 24 bits of float32."""
    rng = np.random.default_rng(3)
    rows, kernel = (rng.normal(size=shape).astype("float32") for shape in ((M, 16), (N, 16, F)))
    load = LOADS["even"]
    counts = np.array(load, "int32")
    wanted = np.einsum("md,mdf->mf", rows.astype("float64"), kernel[np.repeat(np.arange(N), load)])
    exact = jax.jit(functools.partial(tpu_kernels.times, exactly=True))(rows, kernel, counts)
    # Sums of 96 products, below 16: float32 rounds each by 2^-21 at most, bfloat16 by 2^-5.
    np.testing.assert_allclose(exact, wanted, rtol=0, atol=2**-17)


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_a_whole_expert_in_places(load):
    """As on a GPU: all layers of an expert on its blocks, and the gradients of second order."""
    rng = np.random.default_rng(1)
    shapes = (M, D), (N, D, F), (N, F), (N, F, D), (M, D)
    *inputs, upstream = (rng.normal(size=shape).astype("float32") for shape in shapes)
    counts = np.array(load, "int32")
    expert = np.repeat(np.arange(N), load)
    mine = np.zeros((M, N), "float32")
    mine[np.arange(len(expert)), expert] = 1

    def expert_function(rows, kernel, bias, last):
        return jax.numpy.tanh(rows @ kernel + bias[:, None]) @ last

    def in_places(rows, *banks):
        return places.apply(expert_function, rows, counts, list(banks))

    def by_all(rows, *banks):
        y = expert_function(jax.numpy.broadcast_to(rows, (N, M, D)), *banks)
        return jax.numpy.einsum("mn,nmd->md", mine, y)

    def results(call):
        def first_order(*inputs):
            y, back = jax.vjp(call, *inputs)
            gradients = back(upstream)
            return sum((g**2).sum() for g in gradients), (y, gradients)

        return jax.jit(jax.grad(first_order, argnums=(0, 1, 2, 3), has_aux=True))(*inputs)

    for found, wanted in zip(*map(jax.tree.leaves, map(results, (in_places, by_all))), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mean", [7, 8, 13, 64, 100, 500])
def test_a_loop_computes_at_most_2_2_times_the_rows(mean):
    # Pieces of s places, s at most 1.2 times the mean load m: an expert with c rows leaves less
    # than s places empty, all N less than 1.2·N·m, beside the N·m that are taken.
    num_experts = 16
    size = loops.piece_size(mean * num_experts, num_experts)
    assert size % 8 == 0 and size <= max(1.2 * mean, 8)
    rng = np.random.default_rng(0)
    for _ in range(20):
        load = rng.multinomial(mean * num_experts, rng.dirichlet(np.ones(num_experts)))
        assert np.sum(-(-load // size) * size) <= 2.2 * mean * num_experts


@pytest.mark.parametrize("mean, size", [(64, 72), (128, 72), (256, 96), (1, 8)])
def test_even_loads_leave_little_empty(mean, size):
    # 1.2·64 = 76.8, and 8 divides 72. 1.2·128 = 153.6 are two pieces of 76.8; 1.2·256 = 307.2
    # three of 102.4.
    assert loops.piece_size(16 * mean, 16) == size


@pytest.mark.parametrize(
    "mean, size", [(1, 64), (48, 64), (49, 128), (256, 320), (1024, 1152), (1025, 1216)]
)
def test_places_are_tiles_of_cards(mean, size):
    # Multiples of 64 for 1 + 16, 48 + 16, 49 + 16, 256 + 32, 1024 + 128 and 1025 + 128.
    assert places.block_size(16 * mean, 16) == size


@pytest.mark.parametrize("mean", [16, 40, 64, 1000])
def test_kernels_of_tpus_compute_at_most_twice_the_rows(mean):
    # Tiles of s rows, s at most the mean load m: N·m / s, and one visit more for each expert but
    # the first that begins in the middle of one.
    num_experts = 16
    size = tpu_kernels.tile_size(mean * num_experts, num_experts)
    tiles = -(-mean * num_experts // size)
    assert (tiles + num_experts - 1) * size <= 2 * mean * num_experts


@pytest.mark.parametrize(
    "load, further", [([100] * N, 0), ([0, 500, 0, 0, 0], 3), ([128, 129, 128, 115, 0], 1)]
)
def test_places_for_every_load(load, further):
    # 100 rows on average: S = 128 has room for 16 more; and 499 // 128 = 3 further blocks at most,
    # in 8 turns.
    number = 100 * N
    there = jax.jit(places.make_places, static_argnums=1)(np.array(load, "int32"), number)
    assert there.first.row.shape == (N, 128) and there.further.row.shape == (8, 128)
    assert there.number == further
    owner = np.concatenate([there.first.owner, there.further.owner])
    row = np.concatenate([there.first.row, there.further.row])
    assert sorted(row[row >= 0]) == list(range(number))
    assert (row[N + further :] == -1).all()
    expert = np.repeat(np.arange(N), load)
    owners = np.repeat(owner, 128)[row.reshape(-1) >= 0]
    np.testing.assert_array_equal(expert[row][row >= 0], owners)
    first = np.array(there.first.row).reshape(-1)
    placed = np.flatnonzero(np.array(there.place) >= 0)
    np.testing.assert_array_equal(placed, np.sort(first[first >= 0]))
    np.testing.assert_array_equal(first[there.place[placed]], placed)


def test_the_compiled_program_multiplies_by_one_expert_at_a_time():
    shapes = ((M, D), (N, D, F))
    rows, kernel = (jax.ShapeDtypeStruct(shape, "float32") for shape in shapes)
    counts = jax.ShapeDtypeStruct((N,), "int32")
    text = jax.jit(chosen).lower(rows, kernel, counts).as_text()
    # Rows of a piece, 8 places, the fewest, by the matrix of an expert, in a loop.
    (product,) = [line for line in text.splitlines() if "dot_general" in line]
    assert "(tensor<8x3xf32>, tensor<3x2xf32>)" in product
    assert "stablehlo.while" in text
