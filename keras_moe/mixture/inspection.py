"""Watching the mixtures inside a model from outside: batches in, routings out."""

import contextlib

import keras
import numpy as np
from keras import ops

from keras_moe.contract.own_losses import layers_by_name
from keras_moe.mixture.sparse_moe import SparseMoE

_INFINITE = -1  # `tf.data.INFINITE_CARDINALITY`


def mixtures(model):
    """The `SparseMoE` layers of a model by name, numbered where several have the same."""
    mixtures = layers_by_name(model, SparseMoE)
    if not mixtures:
        raise ValueError(
            "The model must have a SparseMoE layer; one that the model makes in its `build` is "
            f"there once the model is built. Received: {model.name!r}, "
            f"{'built' if model.built else 'not built'}"
        )
    return mixtures


def routings(model, x, mixtures):
    """Calls a model on one batch, and leaves its metrics as they were.

    Args:
        model: The model.
        x: What it takes.
        mixtures: Dict from names to `SparseMoE` layers in it.

    Returns:
        Dict from the names to lists with one `Routing` per call of the layer.
    """
    metrics = [(variable, ops.convert_to_numpy(variable)) for variable in model.metrics_variables]
    with contextlib.ExitStack() as stack:
        routings = {
            name: stack.enter_context(layer.recorded_routings()) for name, layer in mixtures.items()
        }
        model(x, training=False)
    for variable, value in metrics:
        variable.assign(value)
    return routings


def load(model, x, mixtures):
    """How many rows each expert gets from a batch or batches: dict from names to arrays [N]."""
    load = {name: np.zeros(layer.num_experts) for name, layer in mixtures.items()}
    for batch in batches(x):
        for name, found in routings(model, batch, mixtures).items():
            for routing in found:
                _, expert, _ = choices(routing)
                load[name] += np.bincount(expert, minlength=len(load[name]))
    return load


def choices(routing):
    """Arrays (example, expert, gate) of the choices that reach an expert."""
    gates = np.array(routing.gates)
    example, choice = np.nonzero(gates > 0)  # As for the dispatch, NaN is no choice.
    return example, np.array(routing.expert_index)[example, choice], gates[example, choice]


def check_batches(x):
    """Returns `x`, or raises ValueError where not every report can read it to its end."""
    if not _is_batch(x):
        if iter(x) is x:
            raise ValueError(
                "`x` is read several times, so it must be an array, a tf.data.Dataset or a list of "
                f"batches. Received: {x!r}, which can be read once"
            )
        if _is_endless(x):
            raise ValueError(
                f"`x` must come to an end; `x.take(10)` has 10 batches. Received: {x!r}, which "
                "repeats for ever"
            )
    return x


def _is_batch(x):
    return isinstance(x, dict) or hasattr(x, "shape")


def _is_endless(x):
    if isinstance(x, keras.utils.PyDataset):
        return x.num_batches is None
    return hasattr(x, "cardinality") and int(x.cardinality()) == _INFINITE


def batches(x):
    """Yields what the model takes."""
    if _is_batch(x):
        yield x
    else:
        if isinstance(x, keras.utils.PyDataset):
            # In Keras 3.10 it can't be iterated: Python would ask it for batches without end.
            x = map(x.__getitem__, range(x.num_batches))
        for batch in x:
            yield keras.utils.unpack_x_y_sample_weight(batch)[0]
