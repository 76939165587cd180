"""R replicas, each with a part of the experts, train as one device does."""

import functools

import keras
import numpy as np
import pytest
from combinations import covering
from replicas import assert_equal_training, fit, flat, hierarchical, make_model, state
from scaling import static_shapes

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

REPLICAS = (1, 2, 4, 8)
# Each number of replicas, each layer (test_distribute_saving.py trains the other one) and each
# optimizer, but not all with all. All with all, 10 minutes:
# `pytest -m "exhaustive or not exhaustive" tests/distribute/test_distribute_training.py`.
USUAL = [
    (1, "flat", "momentum"),
    (2, "flat", "adam"),
    (2, "hierarchical_capacity", "factored"),
    (4, "flat_capacity", "factored"),
    (8, "flat", "momentum"),
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


@covering(USUAL, num_replicas=REPLICAS, layers=LAYERS.keys(), optimizer=OPTIMIZERS.keys())
def test_training(num_replicas, layers, optimizer):
    expected = trained(0, layers, optimizer)
    assert_equal_training(trained(num_replicas, layers, optimizer), expected)
    if "capacity" in layers:
        assert 0.1 < expected[0]["first/fraction_dropped"][0] < 0.9


@pytest.mark.parametrize("layers", ["flat_capacity", "hierarchical_capacity"])
def test_training_in_shapes_that_do_not_depend_on_the_data(layers):
    def train(num_replicas):
        model = make_model(
            num_replicas, lambda: [LAYERS[layers](name="first", kernel_regularizer="l2")]
        )
        return fit(model, epochs=2), state(model)

    with static_shapes():
        got = train(2)
    assert_equal_training(got, train(0))


def test_all_rows_for_one_replica_in_shapes_that_do_not_depend_on_the_data():
    def train(num_replicas):
        model = make_model(num_replicas, lambda: [flat(name="first", capacity_factor=8 / 2)])
        # All logits are equal: experts 0 and 1, those of the first replica, have all the rows.
        kernel = model.get_layer("first").gating.gate_kernel
        kernel.assign(np.zeros(kernel.shape))
        return fit(model, epochs=1), state(model)

    with static_shapes():
        got = train(4)
    assert got[0]["first/fraction_dropped"] == [0.0]
    assert got[0]["first/max_over_mean_load"] == [4.0]
    assert_equal_training(got, train(0))
