"""Functions of every expert's own rows in static shapes."""

import numpy as np
import pytest
from gradients import with_gradients
from helpers import assert_agrees, examples, random_hierarchical, with_random_weights
from keras import ops

from keras_moe import FeedForwardExperts, HierarchicalGating
from keras_moe.dispatch.blocks import block_by_block

pytestmark = pytest.mark.covering


def test_blocks_cost_at_most_twice_the_rows():
    sizes = []

    def recording(rows, bank):
        sizes.append(int(np.prod(rows.shape[:-1])))
        return ops.matmul(rows, bank)

    for rows_per_expert in ([16, 0, 0, 0], [4, 4, 4, 4], [1, 1, 1, 13], [0, 5, 5, 6]):
        rows, kernel = ops.ones((16, 3)), ops.ones((4, 3, 2))
        block_by_block(recording, rows, ops.convert_to_tensor(rows_per_expert), [kernel])
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

        def loss(rows, bank=bank):
            y = bank(rows, rows_per_expert=rows_per_expert)
            return ops.sum(y * upstream), y

        y, by_rows, by_weights = with_gradients(loss, [rows], bank.trainable_weights)
        results.append([y, *by_rows, *by_weights])
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_a_hierarchical_gating_of_static_shapes_agrees_with_the_oracle(masked, training):
    gating = HierarchicalGating(3, 4, k=(2, 2), seed=5, static_shapes=True)
    layer = random_hierarchical(3, 4, 5, gating=gating)
    mask = np.arange(24) % 4 > 0 if masked else None
    assert_agrees(layer, examples(), training=training, mask=mask)
