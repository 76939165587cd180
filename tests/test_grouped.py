"""Functions of every expert's own rows: batched, alone, block by block, and recomputed."""

import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from helpers import WIDTH, assert_agrees, examples, random_hierarchical, run, with_random_weights
from hypothesis import strategies as st

from keras_moe import FeedForwardExperts, HierarchicalGating, NoisyTopKGating, SparseMoE, grouped


def value_and_gradients(function, *arguments):
    with tf.GradientTape() as tape:
        tape.watch(arguments)
        y = function(*arguments)
        total = tf.reduce_sum(tf.sin(y))
    return y, tape.gradient(total, arguments)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    rows_per_expert=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    rest=st.integers(0, 3),
    way=st.sampled_from(
        [{"static_shapes": True}, {}, *({"capacity": tf.constant(c)} for c in (0, 1, 3, 6))]
    ),
)
def test_every_way_multiplies_each_row_by_the_matrix_of_its_expert(rows_per_expert, rest, way):
    capacity, num_experts = int(way.get("capacity", 0)), len(rows_per_expert)
    expert = np.repeat(np.arange(num_experts), rows_per_expert)
    rng = np.random.default_rng(0)
    x, bank = rng.normal(size=(len(expert) + rest, 3)), rng.normal(size=(num_experts, 3, 2))
    y, d_x, d_bank = np.zeros((len(x), 2)), np.zeros_like(x), np.zeros_like(bank)
    for i, e in enumerate(expert):
        y[i] = x[i] @ bank[e]
        slope = np.cos(y[i])  # of the sum of sin(y)
        d_x[i], d_bank[e] = bank[e] @ slope, d_bank[e] + np.outer(x[i], slope)

    # In the order of `apply`: C places of each expert, -1 where empty, then the others, then the
    # rest.
    rows_of = np.split(np.arange(len(x)), np.cumsum(rows_per_expert))
    places = [[*rows[:capacity], *[-1] * (capacity - len(rows))] for rows in rows_of[:-1]]
    order = np.concatenate([*places, *(rows[capacity:] for rows in rows_of[:-1]), rows_of[-1]])
    order = order.astype(int)
    rows = np.vstack([x, np.zeros((1, 3))])[order].astype("float32")
    others = np.maximum(np.array(rows_per_expert) - capacity, 0).astype("int32")

    received, (d_rows, d_weights) = value_and_gradients(
        lambda rows, bank: grouped.apply(tf.matmul, rows, tf.constant(others), [bank], **way),
        tf.constant(rows),
        tf.constant(bank, tf.float32),
    )
    filled = order >= 0
    for ours, oracle in (
        (received.numpy()[filled], y[order[filled]]),
        (d_rows.numpy()[filled], d_x[order[filled]]),
        (d_weights, d_bank),
    ):
        assert not isinstance(ours, tf.IndexedSlices)
        np.testing.assert_allclose(ours, oracle, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("rows_per_expert", "capacity"),
    [
        # P = 10⁶, so a turn of the loop costs 100 + 2·10⁷/10⁶ = 120 rows.
        # A few rows: 2 turns, 240 and the 2 rows, against 4·(1 + 50) = 204 in a batch.
        ([1, 0, 0, 1], 1),
        # One turn, 121, against the same 204.
        ([0, 1, 0, 0], 0),
        # Even: 4·(10 + 50) = 240 against 4·(9 + 50) + 4·20 + 120 + 1.
        ([9, 10, 9, 9], 10),
        # One above the others: 4·(50 + 50) = 400 against 4·(9 + 50) + 4·20 + 120 + 41 = 477, where
        # 4·20 is for adding the loop's gradients to the batch's.
        ([9, 50, 9, 9], 50),
        # One far above the others: 4·(9 + 50) + 4·20 + 120 + 991 = 1427 against 4·(1000 + 50).
        ([9, 1000, 8, 9], 9),
        ([0, 0, 0, 0], 0),
    ],
)
def test_even_capacity_weighs_the_batch_against_the_loop(rows_per_expert, capacity, monkeypatch):
    assert grouped.even_capacity(tf.constant(rows_per_expert), 1_000_000) == 0  # so few experts
    monkeypatch.setattr(grouped, "MOST_PIECES", 3)
    assert grouped.even_capacity(tf.constant(rows_per_expert), 1_000_000) == capacity


@pytest.mark.parametrize(
    ("rows_per_expert", "capacity"),
    [
        # P = 10⁶, so a turn costs 60 + 4.5·10⁶/10⁶ = 64.5 rows. Three turns, 193.5 and the 3 rows,
        # against 4·(1 + 50) = 204 in a batch.
        ([1, 1, 0, 1], 0),
        # Even: four turns, 258 and 40, against 4·(10 + 50) = 240.
        ([10, 10, 10, 10], 10),
        # Six turns, 387 and 245, against 6·(9 + 50) = 354 and one turn, 64.5 and 191.
        ([9, 9, 9, 200, 9, 9], 9),
    ],
)
def test_even_capacity_finds_the_loop_cheaper_without_gradients(
    rows_per_expert, capacity, monkeypatch
):
    monkeypatch.setattr(grouped, "MOST_PIECES", 3)
    rows = tf.constant(rows_per_expert)
    assert grouped.even_capacity(rows, 1_000_000, training=False) == capacity


def test_blocks_cost_at_most_twice_the_rows():
    sizes = []

    def recording(rows, bank):
        sizes.append(int(np.prod(rows.shape[:-1])))
        return tf.matmul(rows, bank)

    for rows_per_expert in ([16, 0, 0, 0], [4, 4, 4, 4], [1, 1, 1, 13], [0, 5, 5, 6]):
        grouped.apply(
            recording,
            tf.ones((16, 3)),
            tf.constant(rows_per_expert),
            [tf.ones((4, 3, 2))],
            static_shapes=True,
        )
    # Blocks of 16/4 rows: 4 for the rows, 3 more that up to 4 experts leave open. 28 rows, whatever
    # the distribution, as XLA needs it.
    assert sizes == [28] * 4


@pytest.mark.parametrize("rows_per_expert", [[4, 0, 5], [0, 0, 0], [12, 0, 0]])
def test_banks_of_static_shapes_equal_the_dynamic_ones(rows_per_expert):
    options = {"activation": "swiglu", "use_bias": True, "output_dim": 2}
    rows, upstream = examples(12), np.float32(np.random.default_rng(1).normal(size=(12, 2)))
    results = []
    for static_shapes in (False, True):
        bank = FeedForwardExperts(3, [4, 3], **options, static_shapes=static_shapes)
        with_random_weights(bank)
        with tf.GradientTape() as tape:
            y = bank(rows, tf.constant(rows_per_expert))
        weights = [weight.value for weight in bank.trainable_weights]
        results.append([y, *tape.gradient(y, weights, output_gradients=upstream)])
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_recomputed_function_is_computed_once_more():
    calls = []

    def function(x, kernel):
        calls.append(1)
        return tf.tanh(x @ kernel)

    rng = np.random.default_rng(0)
    x, kernel = (tf.constant(rng.normal(size=size), tf.float32) for size in ((5, 3), (3, 2)))
    y, gradients = value_and_gradients(function, x, kernel)
    assert len(calls) == 1
    y_again, gradients_again = value_and_gradients(grouped.recomputed(function), x, kernel)
    assert len(calls) == 3  # forward, and in the backward pass
    np.testing.assert_array_equal(y_again, y)
    for ours, theirs in zip(gradients_again, gradients, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_recomputing_survives_the_optimizer_of_the_graph():
    def function(x, kernel):
        return tf.tanh(tf.tanh(x @ kernel) @ kernel)

    def tanhs_run(function):
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            x = tf.compat.v1.placeholder(tf.float32, (4, 4))
            results = value_and_gradients(function, x, tf.eye(4) * x)
            options = tf.compat.v1.RunOptions(output_partition_graphs=True)
            metadata = tf.compat.v1.RunMetadata()
            session.run(results, {x: np.ones((4, 4))}, options, metadata)
        (optimized,) = metadata.partition_graphs
        return sum(node.op == "Tanh" for node in optimized.node)

    assert tanhs_run(function) == 2
    assert tanhs_run(grouped.recomputed(function)) == 4


@pytest.mark.parametrize(
    ("factor", "way"), [(None, "eager"), (None, "graph, any batch"), (0.7, "eager"), (0.7, "xla")]
)
def test_a_layer_that_recomputes_gives_the_same(factor, way):
    gating = NoisyTopKGating(5, k=2, noise=False)
    options = {"gating": gating, "activation": "geglu", "use_bias": True, "num_shared_experts": 1}
    plain, recomputing = (
        with_random_weights(
            SparseMoE(5, [4, 3], capacity_factor=factor, recompute=recompute, **options),
            scale=0.5,
        )
        for recompute in (False, True)
    )
    mask = np.arange(24) % 4 > 0
    upstream = np.random.default_rng(1).normal(size=(24, WIDTH))
    received, expected = (
        run(layer, examples(), upstream, training=True, mask=mask, way=way)
        for layer in (recomputing, plain)
    )
    for ours, theirs in zip(tf.nest.flatten(received), tf.nest.flatten(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    if way == "eager":
        assert_agrees(recomputing, examples(), training=True, mask=mask)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_a_hierarchical_gating_of_static_shapes_agrees_with_the_oracle(masked, training):
    gating = HierarchicalGating(3, 4, k=(2, 2), seed=5, static_shapes=True)
    layer = random_hierarchical(3, 4, 5, gating=gating)
    mask = np.arange(24) % 4 > 0 if masked else None
    assert_agrees(layer, examples(), training=training, mask=mask)
