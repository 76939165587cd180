"""What is another way under JAX, and what is refused there."""

import keras
import numpy as np
import pytest
from helpers import assert_agrees, examples, with_random_weights

from keras_moe import SparseMoE


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_recomputed_experts_agree_with_the_oracle(capacity_factor):
    options = {"num_shared_experts": 2, "recompute": True, "capacity_factor": capacity_factor}
    layer = with_random_weights(SparseMoE(5, [4, 3], k=2, seed=0, use_bias=True, **options))
    assert_agrees(layer, examples(), training=True, mask=np.arange(24) % 5 != 0)


def test_one_example_as_among_others():
    layer = with_random_weights(SparseMoE(5, [4, 3], k=2, use_bias=True))
    x = examples()
    np.testing.assert_allclose(layer(x[:1]), layer(x)[:1], rtol=1e-5, atol=1e-5)


def test_experts_that_count_their_rows_are_refused():
    for part in (
        keras.layers.Dense(6, activity_regularizer="l2"),
        keras.layers.BatchNormalization(),
        # Whose metrics would count the zeros as rows, and whose `Routing`s have them.
        SparseMoE(2, 4, k=1, importance_loss_weight=0.0, load_loss_weight=0.0),
    ):
        layer = SparseMoE(3, experts=keras.Sequential([part]), k=2)
        model = keras.Sequential([keras.Input((6,)), layer])
        model.compile("sgd", "mse")
        with pytest.raises(ValueError, match="Set `capacity_factor`"):
            layer(examples(), training=True)
        assert model.predict(examples(), verbose=0).shape == (24, 6)  # Each row for itself.
        with pytest.raises(ValueError, match="Set `capacity_factor`"):
            model.fit(examples(), examples(), verbose=0)
