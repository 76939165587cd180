"""Grouped products of each way that a device may choose, against one expert after the other."""

import jax
import numpy as np
import pytest

from keras_moe.backend.jax import grouped_products, loops, places

N, M, D, F = 5, 40, 3, 2
LOADS = {
    "even": [8, 8, 8, 8, 8],
    "uneven": [1, 20, 0, 12, 3],  # Four rows of nobody.
    "all to one": [0, 0, 40, 0, 0],
    "none": [0, 0, 0, 0, 0],
}


def in_places(rows, kernel, counts):
    there = places.make_places(counts, rows.shape[0])
    y = places.multiply(places.arrange(rows, there), kernel, there)
    return places.restore(y, there)


def chosen(rows, kernel, counts):
    layout = grouped_products.lay_out(counts, rows.shape[0])
    return grouped_products.multiply(rows, kernel, layout)


WAYS = {"chosen": chosen, "in places": in_places}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_products_and_gradients(way):
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


def test_a_whole_expert_in_places():
    """As on a GPU: laid out once, with parameters of each row's expert between the products."""
    rng = np.random.default_rng(1)
    rows, kernel, bias = (
        rng.normal(size=shape).astype("float32") for shape in ((M, D), (N, D, F), (N, F))
    )
    counts = np.array(LOADS["uneven"], "int32")

    @jax.jit
    def call(rows, kernel, bias, counts):
        layout = grouped_products.Layout(counts, M, places.make_places(counts, M))
        y = grouped_products.multiply(grouped_products.arrange(rows, layout), kernel, layout)
        return grouped_products.restore(y + grouped_products.of_rows(bias, layout), layout)

    expert = np.repeat(np.arange(N), LOADS["uneven"])
    wanted = np.zeros((M, F), "float32")
    wanted[: len(expert)] = np.einsum("md,mdf->mf", rows[: len(expert)], kernel[expert])
    wanted[: len(expert)] += bias[expert]
    np.testing.assert_allclose(call(rows, kernel, bias, counts), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mean", [8, 13, 64, 100, 500])
def test_a_loop_computes_at_most_twice_the_rows(mean):
    # Pieces of s places, s at most the mean load m: an expert with c rows leaves less than s places
    # empty, all N less than N·s ≤ N·m, which is all rows again.
    num_experts = 16
    size = loops.piece_size(mean * num_experts, num_experts)
    rng = np.random.default_rng(0)
    for _ in range(20):
        load = rng.multinomial(mean * num_experts, rng.dirichlet(np.ones(num_experts)))
        assert np.sum(-(-load // size) * size) <= 2 * mean * num_experts


def test_places_for_every_load():
    """What a GPU computes: 1.5 times the rows, and where that is not enough for one, once more."""
    number = 8 * N
    make_places = jax.jit(places.make_places, static_argnums=1)
    load = np.zeros(N, "int32")
    load[1] = number  # The worst: one expert has all.
    there = make_places(load, number)
    assert there.row.shape == (N + number // 12, 12)
    row = np.array(there.row)
    assert sorted(row[row >= 0]) == list(range(number))
    assert there.has_further
    assert not make_places(np.full(N, 8, "int32"), number).has_further


def test_the_compiled_program_multiplies_by_one_expert_at_a_time():
    shapes = ((M, D), (N, D, F))
    rows, kernel = (jax.ShapeDtypeStruct(shape, "float32") for shape in shapes)
    counts = jax.ShapeDtypeStruct((N,), "int32")
    text = jax.jit(chosen).lower(rows, kernel, counts).as_text()
    # Rows of a piece, 8 places, the fewest, by the matrix of an expert, in a loop.
    (product,) = [line for line in text.splitlines() if "dot_general" in line]
    assert "(tensor<8x3xf32>, tensor<3x2xf32>)" in product
    assert "stablehlo.while" in text
