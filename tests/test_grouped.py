"""Functions of every expert's own rows: piece by piece, block by block, and recomputed."""

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


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
    rows_per_expert=st.lists(st.integers(0, 6), min_size=1, max_size=5), rest=st.integers(0, 3)
)
def test_block_by_block_equals_piece_by_piece(rows_per_expert, rest):
    rng = np.random.default_rng(0)
    rows = tf.constant(rng.normal(size=(sum(rows_per_expert) + rest, 3)), tf.float32)
    bank = tf.constant(rng.normal(size=(len(rows_per_expert), 3, 2)), tf.float32)

    def by(static_shapes):
        return value_and_gradients(
            lambda rows, bank: grouped.apply(
                tf.matmul, rows, tf.constant(rows_per_expert), [bank], static_shapes
            ),
            rows,
            bank,
        )

    (y, gradients), (y_blocks, gradients_of_blocks) = by(False), by(True)
    expected = np.zeros((len(rows), 2))
    for row, expert in enumerate(np.repeat(np.arange(len(rows_per_expert)), rows_per_expert)):
        expected[row] = rows[row].numpy() @ bank[expert].numpy()
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(y_blocks, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients_of_blocks, gradients, strict=True):
        assert not isinstance(ours, tf.IndexedSlices)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_blocks_cost_at_most_twice_the_rows():
    sizes = []

    def recording(rows, bank):
        sizes.append(int(np.prod(rows.shape[:-1])))
        return tf.matmul(rows, bank)

    for rows_per_expert in ([16, 0, 0, 0], [4, 4, 4, 4], [1, 1, 1, 13], [0, 5, 5, 6]):
        grouped.apply(
            recording, tf.ones((16, 3)), tf.constant(rows_per_expert), [tf.ones((4, 3, 2))], True
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
