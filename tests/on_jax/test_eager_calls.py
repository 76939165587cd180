"""Layers that are called outside of compiled functions, where JAX compiles what it doesn't know."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from helpers import EVERY_LAYER, examples, with_random_weights

from keras_moe import SparseMoE
from keras_moe.backend.jax import places
from keras_moe.mixture import inspection


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


def test_a_model_watched_again_compiles_nothing(caplog):
    # An eager call would: JAX has a loop over time for each call of an LSTM.
    model = keras.Sequential(
        [keras.Input((3, 4)), keras.layers.LSTM(4, return_sequences=True), SparseMoE(5, 8, k=2)]
    )
    watch, x = inspection.watch(model), np.ones((2, 3, 4), "float32")
    assert compiled_again(lambda: watch.load(x), caplog) == []
    assert inspection.watch(model, watch) is watch
    (once,), (twice,) = watch.load(x).values(), watch.load([x, x]).values()
    np.testing.assert_array_equal(twice, 2 * once)


def test_a_watched_model_is_called_as_it_is_told():
    model = keras.Sequential([keras.Input((4,)), SparseMoE(5, 8, k=2, name="mixture")])
    model.compile("sgd", "mse", run_eagerly=True)
    watch, x = inspection.watch(model), np.eye(4, dtype="float32")
    assert watch.load(x)["mixture"].sum() == 2 * 4  # K choices of each example
    model.run_eagerly = False
    assert watch.load(x)["mixture"].sum() == 2 * 4
    # Weights are read at each call: now example i has its largest gate from expert i + 1.
    model.get_layer("mixture").gating.gate_kernel.assign(np.eye(4, 5, 1))
    assert (watch.load(x)["mixture"][1:] >= 1).all()
