"""What Tables 7 and 8 count: operations per word, and parameters."""

import math
from typing import NamedTuple

import tensorflow as tf

from keras_moe.models.language_model import LanguageModel
from keras_moe.sparse_moe import SparseMoE


class Footprint(NamedTuple):
    """The size of a model without embedding and softmax.

    Attributes:
        ops_per_timestep: Multiply-adds of the forward pass for one word.
        parameters: Number of parameters.
    """

    ops_per_timestep: int
    parameters: int


def footprint(model):
    """Counts operations and parameters as Tables 7 and 8 do.

    Operations are the multiply-adds of all matrices that a word meets: of the LSTMs, of the k
    experts chosen, and of the gating with the matrices of its noise; in a hierarchical gating those
    of all groups and those within the groups chosen. Embedding and softmax are left out, and so is
    whatever is no product of matrices.

    Args:
        model: A `LanguageModel`; or a `Preset` or its name, whose model is then built without its
            values, so that 137 billion parameters are counted at once.

    Returns:
        A `Footprint`.
    """
    if not isinstance(model, LanguageModel):
        with tf.variable_creator_scope(_without_values):
            model = LanguageModel.from_preset(model, vocabulary_size=1)
            _build(model)
    layers = [*model.lstms, *([] if model.middle is None else [model.middle])]
    return Footprint(
        sum(_operations(layer) for layer in layers),
        sum(_size(weight) for layer in layers for weight in layer.trainable_weights),
    )


def _without_values(next_creator, **kwargs):
    """Creates a variable of no size, of any shape: Keras knows the shape that it asked for."""
    empty = {"initial_value": tf.zeros([0], kwargs["dtype"]), "shape": tf.TensorShape(None)}
    return next_creator(**{**kwargs, **empty})


def _build(model):
    if isinstance(model.middle, SparseMoE):
        # By their `build`: a symbolic call would multiply by what has no shape.
        for part in (model.middle.gating, model.middle.experts):
            part.build((None, model.width))
    model.build((None, None))


def _operations(layer):
    """Multiply-adds for one word."""
    if not isinstance(layer, SparseMoE):
        return _matrices(layer)
    chosen, num_experts = math.prod(_as_tuple(layer.k)), layer.num_experts
    experts = sum(_size(weight) for weight in layer.experts.weights if weight.expert_rank == 2)
    operations = _matrices(layer.gating) + experts * chosen // num_experts
    if hasattr(layer.gating, "secondary"):  # Variables [A, D, B], of A groups.
        secondary = [w for w in layer.gating.trainable_weights if len(w.shape) == 3]
        operations += sum(map(_size, secondary)) * layer.gating.k[0] // layer.gating.num_groups
    return operations


def _matrices(layer):
    """The sizes of all matrices of a layer. A bias multiplies nothing."""
    return sum(_size(weight) for weight in layer.trainable_weights if len(weight.shape) == 2)


def _size(weight):
    return math.prod(weight.shape)


def _as_tuple(k):
    return k if isinstance(k, tuple) else (k,)
