"""Watching the mixtures inside a model from outside: batches in, routings out."""

import contextlib

import keras
import numpy as np
from keras import ops

from keras_moe.backend import compilation
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


class Watch:
    """A model that is called without training, watched for what its mixtures choose.

    Args:
        model: The model. Its metrics are left as they are.

    Attributes:
        mixtures: Dict from names to the `SparseMoE` layers in it.
    """

    def __init__(self, model):
        self.model = model
        self.mixtures = mixtures(model)
        self._recorded = compilation.reading_often(model, self._record)

    def _record(self, x):
        with contextlib.ExitStack() as stack:
            found = {
                name: stack.enter_context(layer.recorded_routings())
                for name, layer in self.mixtures.items()
            }
            self.model(x, training=False)
        return found

    def routings(self, x):
        """Of one batch, a dict from the names to lists with a `Routing` per call of the layer."""
        metrics = [
            (variable, ops.convert_to_numpy(variable)) for variable in self.model.metrics_variables
        ]
        found = self._recorded(x)
        for variable, value in metrics:
            variable.assign(value)
        return found

    def load(self, x):
        """How many rows each expert gets from a batch or batches: from names to arrays [N]."""
        load = {name: np.zeros(layer.num_experts) for name, layer in self.mixtures.items()}
        for batch in batches(x):
            for name, found in self.routings(batch).items():
                for routing in found:
                    _, expert, _ = choices(routing)
                    load[name] += np.bincount(expert, minlength=len(load[name]))
        return load


def watch(model, before=None):
    """A `Watch` of a model: the one before, with what it has compiled, if that is of the same."""
    same = before is not None and before.model is model and before.mixtures == mixtures(model)
    return before if same else Watch(model)


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
