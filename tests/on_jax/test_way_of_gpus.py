"""Layers that compute as on a GPU, here on a CPU, against the oracle."""

import jax
import numpy as np
import pytest
from helpers import EVERY_LAYER, assert_agrees, examples, numpy, with_random_weights

from keras_moe import FeedForwardExperts
from keras_moe.backend.jax import places

T = 200
LAYERS = {
    "biases": EVERY_LAYER["noisy_top_k"](seed=0, use_bias=True, num_shared_experts=1),
    "recomputed": EVERY_LAYER["noisy_top_k"](seed=0, recompute=True),
    "strictly balanced": EVERY_LAYER["strictly_balanced"](),
    "hierarchical": EVERY_LAYER["hierarchical"](seed=0),
}


def compute_as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *inputs, cuda, **_: cuda(*inputs))


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_all_gradients_agree_with_the_oracle(name, monkeypatch):
    compute_as_on_a_gpu(monkeypatch)
    # What all examples have in common makes the load uneven.
    layer, x = with_random_weights(LAYERS[name]), examples(T) + 2.0
    if name != "strictly balanced":  # Which is even in training.
        routing = layer.route(x)
        chosen = numpy(routing.expert_index)[numpy(routing.gates) > 0]
        load = np.bincount(chosen, minlength=layer.num_experts)
        assert load.max() > places.block_size(
            load.sum(), layer.num_experts
        )  # So there are more blocks than experts.
    assert_agrees(layer, x, training=True, mask=np.arange(T) % 5 != 0)


def test_experts_in_int8_compute_as_on_a_cpu(monkeypatch):
    bank = FeedForwardExperts(4, 3, use_bias=True)
    bank.build((None, 6))
    bank.quantize("int8")
    rows, counts = examples(60), np.array([40, 0, 3, 10], "int32")
    expected = numpy(bank(rows, counts))
    compute_as_on_a_gpu(monkeypatch)
    np.testing.assert_allclose(bank(rows, counts), expected, rtol=1e-5, atol=1e-6)
    assert (expected[53:] == 0).all() and np.abs(expected[:53]).max() > 0.1
