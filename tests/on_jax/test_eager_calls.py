"""Layers that are called outside of compiled functions, where JAX compiles what it doesn't know."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import EVERY_LAYER, examples, with_random_weights

from keras_moe.backend.jax import places


def compiled_again(call, caplog):
    """What JAX compiles in a second call of a function."""
    call()
    with jax.log_compiles(), caplog.at_level("WARNING", "jax"):
        caplog.clear()
        call()
    return [r.getMessage() for r in caplog.records if "Finished XLA comp" in r.getMessage()]


@pytest.mark.parametrize("name", ["noisy_top_k", "balanced_capacity", "hierarchical"])
def test_a_layer_called_again_compiles_nothing(name, caplog):
    layer, x = with_random_weights(EVERY_LAYER[name]()), examples(7)
    assert compiled_again(lambda: layer(x, training=True), caplog) == []


@pytest.mark.parametrize("load", [[4, 4], [40, 4]])  # Of 36 places; without and with more blocks.
def test_products_in_places_compile_nothing_the_second_time(load, caplog):
    rows, kernel = np.ones((sum(load), 3), "float32"), np.ones((2, 3, 5), "float32")

    def product():
        return places.apply(jnp.matmul, rows, jnp.asarray(load, "int32"), [kernel])

    assert compiled_again(product, caplog) == []


def test_what_is_compiled_is_seen(caplog):
    assert compiled_again(lambda: jax.jit(lambda x: x + 1)(np.ones(3)), caplog)
