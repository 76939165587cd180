"""The way of the rows to their experts and back."""

import hypothesis
import numpy as np
import pytest
from combinations import draws
from gradients import with_gradients
from hypothesis import strategies as st
from keras import ops

from keras_moe import Routing, dispatch
from keras_moe.backend import pieces


def routing(expert_index, gates):
    expert_index = ops.convert_to_tensor(expert_index, "int32")
    return Routing(expert_index, ops.convert_to_tensor(gates, "float32"), None, None)


GATES = [[0.5, 0.5], [0.9, 0.1], [1, np.nan]]


def test_plan_sorts_by_expert_and_puts_dead_choices_last():
    plan = dispatch.make_plan(routing([[2, 0], [0, 1], [2, 1]], GATES), 4)
    # Rows in order of expert, then of choice, then of example: 0 of example 1, whose first choice
    # it is, and of 0; 1 of example 1; 2 of examples 0 and 2. The last choice has no gate: NaN.
    np.testing.assert_array_equal(plan.example, [1, 0, 1, 0, 2, 2])
    np.testing.assert_array_equal(plan.choice, [2, 1, 3, 0, 4, 5])
    np.testing.assert_array_equal(plan.position, [[3, 1], [0, 2], [4, 5]])
    np.testing.assert_array_equal(plan.rows_per_expert, [2, 1, 2, 0])


def test_plan_with_a_capacity_tells_empty_places_by_what_is_behind_the_last():
    plan = dispatch.make_plan(routing([[2, 0], [0, 1], [2, 1]], GATES), 4, capacity=2)
    # As above, but two places each: 1 of expert 1 and both of expert 3 are empty.
    np.testing.assert_array_equal(plan.example, [1, 0, 1, 3, 0, 2, 3, 3])
    np.testing.assert_array_equal(plan.choice, [2, 1, 3, 6, 0, 4, 6, 6])
    np.testing.assert_array_equal(plan.kept, [[True, True], [True, True], [True, False]])
    np.testing.assert_array_equal(
        dispatch.dispatch(ops.convert_to_tensor([[1.0], [2.0], [3.0]]), plan)[..., 0],
        [[2, 1], [2, 0], [1, 3], [0, 0]],
    )


def test_plan_of_no_example_with_places():
    plan = dispatch.make_plan(routing(np.zeros((0, 2)), np.zeros((0, 2))), 3, capacity=2)
    np.testing.assert_array_equal(plan.example, np.zeros(6))  # T = 0 is behind the last one.
    np.testing.assert_array_equal(plan.choice, np.zeros(6))


@hypothesis.settings(max_examples=draws(50, in_jax=12), deadline=None)
@hypothesis.given(data=st.data())
def test_every_row_meets_its_expert_and_comes_back(data):
    num_experts = data.draw(st.integers(1, 6))
    k = data.draw(st.integers(1, num_experts))
    examples = data.draw(st.integers(0, 7))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    index = np.array([rng.permutation(num_experts)[:k] for _ in range(examples)]).reshape(-1, k)
    gates = rng.random((examples, k)) * (rng.random((examples, k)) < 0.8)
    x = rng.normal(size=(examples, 3)).astype("float32")
    # Expert i multiplies by i + 1, so example t gets x_t · Σ_k gate·(index + 1).
    plan = dispatch.make_plan(routing(index, gates), num_experts)
    *parts, rest = pieces.split(dispatch.dispatch(x, plan), plan.rows_per_expert)
    assert len(parts) == num_experts
    rows = pieces.join([piece * (i + 1) for i, piece in enumerate(parts)], rest)
    y = dispatch.combine(rows, ops.convert_to_tensor(gates, "float32"), plan)
    np.testing.assert_allclose(
        y, x * (gates * (index + 1)).sum(axis=1, keepdims=True), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("capacity", [None, 5])  # 5 examples: nothing is dropped
def test_gradients_are_dense_and_right(capacity):
    rng = np.random.default_rng(0)
    index = np.array([rng.permutation(4)[:2] for _ in range(5)])
    gates = np.float32(rng.random((5, 2)) * [[1, 1], [1, 0], [1, 1], [0, 0], [1, 1]])
    x = np.float32(rng.normal(size=(5, 3)))
    upstream = np.float32(rng.normal(size=(5, 3)))
    plan = dispatch.make_plan(routing(index, gates), 4, capacity)
    if capacity is None:  # 3 dead choices come last.
        numbers = [*np.array(plan.rows_per_expert), 3]
        scale_of_row = np.repeat(np.float32([1, 2, 3, 4, 0]), numbers)[:, None]
    else:
        scale_of_row = np.float32([1, 2, 3, 4])[:, None, None]

    def loss(x, gates):
        rows = dispatch.dispatch(x, plan) * scale_of_row
        return ops.sum(dispatch.combine(rows, gates, plan) * upstream), ()

    _, (d_x, d_gates), _ = with_gradients(loss, [x, gates], [])
    # loss = Σ_t Σ_k gate·scale(expert)·<x_t, upstream_t>, where scale is 0 for dead choices.
    scale = (index + 1) * (gates > 0)
    np.testing.assert_allclose(
        d_x, (gates * scale).sum(axis=1, keepdims=True) * upstream, rtol=1e-5
    )
    inner = np.sum(x * upstream, axis=1, keepdims=True)
    np.testing.assert_allclose(d_gates, scale * inner, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("capacity", "expected", "expected_gradient"),
    # With a capacity choices that count for nothing have no row. The gradient of row r is the
    # number of its choice, 2·example + k, and that of an empty place nothing.
    [
        (None, [1, 1, 2, 2, 3, 3, 4, 4], [2, 1, 3, 0, 4, 6, 5, 7]),
        (3, [1, 1, 2, 2, 3, 0, 0, 0], [2, 1, 0, 3, 0, 0, 0, 4, 0]),
    ],
)
def test_collect_undoes_the_sort(capacity, expected, expected_gradient):
    gates = [[0.5, 0.5], [0.9, 0.1], [1, 0], [np.nan, np.nan]]
    plan = dispatch.make_plan(routing([[2, 0], [0, 1], [2, 1], [1, 0]], gates), 3, capacity)
    rows = dispatch.dispatch(ops.convert_to_tensor([[1.0], [2.0], [3.0], [4.0]]), plan)

    def loss(rows):
        collected = dispatch.collect(rows, plan)
        return ops.sum(collected * np.arange(8, dtype="float32")[:, None]), collected

    collected, (gradient,), _ = with_gradients(loss, [rows], [])
    np.testing.assert_array_equal(np.ravel(collected), expected)
    np.testing.assert_array_equal(np.ravel(gradient), expected_gradient)
