"""Activations whose gradient needs no more than their result."""

import jax
import keras
import numpy as np
import pytest

from keras_moe.backend import activations


def test_relu_and_its_gradient_are_those_of_keras():
    x = np.array([-np.inf, -2, -0.0, 0, 1e-30, 3, np.inf, np.nan], "float32")
    upstream = np.arange(1.0, 9, dtype="float32")
    results, back = jax.vjp(activations.lean(keras.activations.relu), x)
    expected, expected_back = jax.vjp(keras.activations.relu, x)
    np.testing.assert_array_equal(results, expected)
    np.testing.assert_array_equal(back(upstream), expected_back(upstream))


def test_the_backward_pass_reads_the_result_alone():
    relu = activations.lean(keras.activations.relu)
    x = np.ones(3, "float32")
    gradient = jax.make_jaxpr(lambda x, upstream: jax.vjp(relu, x)[1](upstream))(x, x)
    of_x = [e.primitive.name for e in gradient.eqns if gradient.jaxpr.invars[0] in e.invars]
    assert of_x == ["custom_jvp_call"]  # Of JAX's own a comparison follows.


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "gelu", "linear"])
def test_all_others_are_what_they_were(name):
    activation = keras.activations.get(name)
    assert activations.lean(activation) is activation
