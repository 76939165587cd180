"""What the signatures of an export read in place of a model's variables."""

import keras
import tensorflow as tf

from keras_moe.distribute.sharded_variable import ShardedVariable
from keras_moe.experts.feed_forward import FeedForwardExperts
from keras_moe.mixture.sparse_moe import SparseMoE
from keras_moe.serving.internals import layers_within


class StoredWeights:
    """What an export stores of some layers.

    In bfloat16 float32 matrices take half the room. A signature converts them back once per call,
    except experts' kernels and embeddings: of those it reads what a request needs, and converts
    that. Gating stays in float32, as examples would go to other experts; vectors and the scales of
    quantized layers take no room.

    Args:
        layers: Built layers.
        dtype: `"bfloat16"`, or `None` to store each weight in its own dtype.

    Attributes:
        narrow: Dict from the id of a Keras variable to the variable that is stored instead.
        frozen: Pairs of a Keras variable and its value, for metrics and the state of seeds.
    """

    def __init__(self, layers, dtype=None):
        parts = [part for layer in layers for part in layers_within(layer)]
        weights = {id(weight): weight for layer in layers for weight in layer.weights}
        exact = {id(weight) for part in parts for weight in _exact(part)}
        self._read_by_rows = {id(weight) for part in parts for weight in _read_by_rows(part)}
        self.narrow = {
            key: tf.Variable(tf.cast(weight.value, dtype), name=weight.path)
            for key, weight in weights.items()
            if dtype is not None and _is_matrix(weight) and key not in exact
        }
        # A server has one device, which holds all rows of what replicas hold in shards.
        for key, weight in weights.items():
            if key not in self.narrow and isinstance(weight.value, ShardedVariable):
                self.narrow[key] = weight.value.gathered(name=weight.path)
        state = [v for layer in layers for v in [*layer.variables, *layer.metrics_variables]]
        self.frozen = [(v, keras.ops.convert_to_numpy(v)) for v in state if id(v) not in weights]

    def read(self, variable):
        """What a layer is to compute with; `None` for the variable itself."""
        if id(variable) not in self.narrow:
            return None
        value = tf.convert_to_tensor(self.narrow[id(variable)])
        return value if id(variable) in self._read_by_rows else tf.cast(value, variable.dtype)


class ServingScope(keras.StatelessScope):
    """Inside, layers read what is stored, and whatever they update is forgotten.

    To be entered where a graph begins.

    Args:
        weights: `StoredWeights`.
    """

    def __init__(self, weights):
        super().__init__(weights.frozen)
        self._weights = weights
        self._graph = tf.compat.v1.get_default_graph()

    def get_current_value(self, variable):
        if id(variable) not in self.state_mapping:
            with self._graph.as_default():  # In a loop each turn would convert it anew.
                self.state_mapping[id(variable)] = self._weights.read(variable)
        return self.state_mapping[id(variable)]


def _is_matrix(weight):
    return weight.dtype == "float32" and len(weight.shape) >= 2


def _exact(layer):
    if isinstance(layer, SparseMoE):
        return layer.gating.weights
    return layer.scales if isinstance(layer, FeedForwardExperts) and layer.built else []


def _read_by_rows(layer):
    if not layer.built:  # The model has it, but doesn't call it.
        return []
    if isinstance(layer, FeedForwardExperts):
        return layer.kernels
    return [layer.embeddings] if isinstance(layer, keras.layers.Embedding) else []
