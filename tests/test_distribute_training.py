"""R replicas, each with a part of the experts, train as one device does."""

import functools

import keras
import pytest
from replicas import assert_equal_training, fit, flat, hierarchical, make_model, state

from keras_moe.distribute import internals
from keras_moe.optimizers import FactoredAdam

OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(0.01),
    "momentum": lambda: keras.optimizers.SGD(0.01, momentum=0.9),
    "factored": lambda: FactoredAdam(0.01),
}
LAYERS = {
    "flat": flat,
    "flat_capacity": functools.partial(flat, capacity_factor=0.6),
    "hierarchical": hierarchical,
    "hierarchical_capacity": functools.partial(hierarchical, capacity_factor=0.6),
}


# Each number of replicas, each layer and each optimizer, but not all with all.
CASES = [
    (1, "flat", "adam"),
    (2, "flat", "adam"),
    (2, "flat", "momentum"),
    (2, "flat", "factored"),
    (2, "hierarchical", "factored"),
    (2, "hierarchical_capacity", "momentum"),
    (4, "flat_capacity", "adam"),
    (4, "hierarchical", "factored"),
    (8, "flat", "factored"),
    (8, "hierarchical_capacity", "momentum"),
]


@functools.cache
def trained(num_replicas, layers, optimizer):
    options = {"kernel_regularizer": "l2"}
    # Of two layers' losses none is counted twice, or for the other one.
    names = ["first", "second"] if (layers, optimizer) == ("flat", "adam") else ["first"]
    model = make_model(
        num_replicas,
        lambda: [LAYERS[layers](name=name, **options) for name in names],
        OPTIMIZERS[optimizer],
    )
    return fit(model), state(model)


@pytest.mark.parametrize(("num_replicas", "layers", "optimizer"), CASES)
def test_training(num_replicas, layers, optimizer):
    expected = trained(0, layers, optimizer)
    assert_equal_training(trained(num_replicas, layers, optimizer), expected)
    if "capacity" in layers:
        assert 0.1 < expected[0]["first/fraction_dropped"][0] < 0.9


@pytest.mark.parametrize("layers", ["flat_capacity", "hierarchical_capacity"])
def test_training_in_shapes_that_do_not_depend_on_the_data(layers, monkeypatch):
    # As where XLA compiles, which for CPUs has no all-to-all.
    monkeypatch.setattr(internals, "compiling", lambda: True)
    model = make_model(2, lambda: [LAYERS[layers](name="first", kernel_regularizer="l2")])
    got = fit(model), state(model)
    monkeypatch.undo()
    model = make_model(0, lambda: [LAYERS[layers](name="first", kernel_regularizer="l2")])
    assert_equal_training(got, (fit(model), state(model)))
