"""Layers that compute as on a GPU, here on a CPU, against the oracle."""

import jax
import numpy as np
import pytest
from helpers import EVERY_LAYER, assert_agrees, examples, numpy, with_random_weights

from keras_moe import FeedForwardExperts
from keras_moe.backend.jax import places

T = 600
LAYERS = {
    "biases": EVERY_LAYER["noisy_top_k"](seed=0, use_bias=True, num_shared_experts=1),
    "recomputed": EVERY_LAYER["noisy_top_k"](seed=0, recompute=True),
    "strictly balanced": EVERY_LAYER["strictly_balanced"](),
    "hierarchical": EVERY_LAYER["hierarchical"](k=(1, 2), seed=0),
}


def compute_as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *inputs, cuda, **_: cuda(*inputs))


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_all_gradients_agree_with_the_oracle(name, monkeypatch):
    compute_as_on_a_gpu(monkeypatch)
    # What all examples have in common makes the load uneven.
    layer, x = with_random_weights(LAYERS[name]), examples(T) / 4 - 2
    expected = assert_agrees(layer, x, training=True, mask=np.arange(T) % 5 != 0)
    if name != "strictly balanced":  # Which is even in training.
        load = np.bincount(expected.expert_index[expected.gates > 0])
        # More blocks than experts.
        assert load.max() > places.block_size(expected.gates.size, layer.num_experts)


def test_experts_in_int8_compute_as_on_a_cpu(monkeypatch):
    bank = FeedForwardExperts(4, 3, use_bias=True)
    bank.build((None, 6))
    bank.quantize("int8")
    # 75 rows on average, so S = 128, and the first expert has two blocks.
    rows, counts = examples(300), np.array([200, 0, 15, 50], "int32")
    expected = numpy(bank(rows, counts))
    compute_as_on_a_gpu(monkeypatch)
    np.testing.assert_allclose(bank(rows, counts), expected, rtol=1e-5, atol=1e-6)
    assert (expected[265:] == 0).all() and np.abs(expected[:265]).max() > 0.1
