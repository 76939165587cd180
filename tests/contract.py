"""Every public layer, as `test_contract.py` tries it: the one place where a new one is named."""

import types
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

import keras_moe
from keras_moe import (
    FeedForwardExperts,
    HierarchicalBalancedGating,
    HierarchicalGating,
    HierarchicalMoE,
    LayerExperts,
    NoisyTopKGating,
    SoftmaxGating,
    SparseMoE,
    StrictlyBalancedGating,
)
from keras_moe.layers import (
    AdditiveAttention,
    AttentionLSTM,
    ProductAttention,
    ProjectedLSTM,
    ProjectedLSTMCell,
    SampledSoftmax,
)

WIDTH = 6
ROWS_PER_EXPERT = [3, 0, 4]  # One row of the eight is no expert's.


class Contract(NamedTuple):
    """How to make a layer and how to call it.

    Attributes:
        make: Function from keyword arguments of `keras.layers.Layer` to a new layer.
        shapes: The shapes of the float inputs.
        call: Function of the layer, the inputs and keyword arguments.
        masks: Which inputs can have a mask, by the keyword argument's name.
        parts: Parts that can be frozen alone, by attribute.
        only_float32: Whether there is no other dtype policy.
        twice_in_training: Whether the layer can be differentiated twice in training.
        counts_rows: Whether under JAX, where it gets rows of zeros as well, it refuses to train.
        any_width: Inputs that no weight is multiplied by, so that they may be of any width.
    """

    make: Any
    shapes: tuple
    call: Any = lambda layer, x, **kwargs: layer(x, **kwargs)
    masks: dict = types.MappingProxyType({"mask": 0})
    parts: tuple = ()
    only_float32: bool = False
    twice_in_training: bool = True
    counts_rows: bool = False
    any_width: tuple = ()

    @property
    def cls(self):
        return type(self.make())

    def inputs(self, seed=0):
        """Random float32 arrays."""
        rng = np.random.default_rng(seed)
        return [rng.normal(size=shape).astype("float32") for shape in self.shapes]

    def built(self, seed=0, **kwargs):
        """A layer with random weights: the initial ones of a gating, zeros, would test ties."""
        layer = self.make(**kwargs)
        self.call(layer, *self.symbolic())
        rng = np.random.default_rng(seed)
        for weight in layer.trainable_weights:
            weight.assign(0.5 * rng.normal(size=weight.shape))
        return layer

    def symbolic(self, dtype="float32", **kwargs):
        """Symbolic inputs of these shapes, the first dimension unknown."""
        return [keras.Input(shape[1:], dtype=dtype, **kwargs) for shape in self.shapes]

    def outputs(self, layer, *inputs, **kwargs):
        """All tensors that a call returns, in a list."""
        return keras.tree.flatten(self.call(layer, *inputs, **kwargs))


def bank(make, parts=(), **options):
    def call(layer, rows, **kwargs):
        return layer(rows, rows_per_expert=np.array(ROWS_PER_EXPERT, "int32"), **kwargs)

    return Contract(make, ((8, WIDTH),), call, masks={}, parts=parts, **options)


def attention(cls):
    def call(layer, *inputs, **kwargs):
        masks = {"mask": [kwargs.pop("query_mask", None), kwargs.pop("value_mask", None)]}
        kwargs.pop("training", None)
        return layer(list(inputs), **(masks if any(m is not None for m in masks["mask"]) else {}))

    parts = ("attention",) if cls is AdditiveAttention else ()
    shapes = ((2, 3, WIDTH), (2, 4, 5), (2, 4, 7))
    return Contract(
        lambda **options: cls(4, **options),
        shapes,
        call,
        {"query_mask": 0, "value_mask": 1},
        parts,
        any_width=(1,),
    )


def mixture(make, parts=("gating", "experts"), shape=(2, 5, WIDTH), **options):
    return Contract(make, (shape,), parts=parts, **options)


def gating(make):
    return Contract(make, ((9, WIDTH),), only_float32=True)


def attention_lstm(name):
    def call(layer, *inputs, training=None, **kwargs):
        return layer(*inputs, **kwargs)

    return Contract(
        lambda **options: AttentionLSTM(4, 3, name, **options),
        ((2, 3, WIDTH), (2, 4, 5)),
        call,
        {"source_mask": 1},
        ("cell", "attention"),
    )


def cell():
    def call(layer, x, *states, training=None):
        return layer(x, list(states))

    return Contract(
        lambda **options: ProjectedLSTMCell(4, 3, **options),
        ((2, WIDTH), (2, 3), (2, 4)),
        call,
        {},
    )


# TensorFlow's moments hold the mean fixed: right once, wrong when differentiated twice.
NORMALIZED = {"twice_in_training": False, "counts_rows": True}


def expert(**kwargs):
    """An expert with parts of its own, and with weights that no optimizer trains."""
    layers = [keras.layers.Dense(4, "tanh"), keras.layers.BatchNormalization(epsilon=0.1)]
    return keras.Sequential([*layers, keras.layers.Dense(WIDTH)], name="expert", **kwargs)


CONTRACTS = {
    "noisy_top_k": mixture(lambda **o: SparseMoE(5, 4, k=2, activation="tanh", seed=0, **o)),
    "softmax": mixture(
        lambda **o: SparseMoE(5, 4, gating="softmax", activation="gelu", use_bias=True, **o)
    ),
    "strictly_balanced": mixture(
        lambda **o: SparseMoE(5, 4, k=2, gating="strictly_balanced", activation="tanh", **o)
    ),
    "capacity": mixture(
        lambda **o: SparseMoE(5, [4, 3], k=2, seed=0, capacity_factor=1.0, activation="swiglu", **o)
    ),
    "shared": mixture(
        lambda **o: SparseMoE(
            5, 4, k=1, activation="tanh", seed=0, num_shared_experts=2, recompute=True, **o
        ),
        ("gating", "experts", "shared_experts"),
    ),
    "layer_experts": mixture(
        lambda **o: SparseMoE(3, k=2, seed=0, experts=expert(), num_shared_experts=1, **o),
        ("gating", "experts", "shared_experts", "experts.layers.1", "shared_experts.layers.0"),
        **NORMALIZED,
    ),
    "own_parts": mixture(
        lambda **o: SparseMoE(
            3,
            gating=NoisyTopKGating(3, 2, noise=False),
            experts=FeedForwardExperts(3, 4, activation="tanh"),
            **o,
        ),
        shape=(8, WIDTH),
    ),
    "hierarchical": mixture(lambda **o: HierarchicalMoE(2, 3, 4, activation="tanh", seed=0, **o)),
    "hierarchical_capacity": mixture(
        lambda **o: HierarchicalMoE(
            2, 3, 4, k=(1, 2), capacity_factor=2.0, seed=0, activation="tanh", **o
        )
    ),
    "hierarchical_balanced": mixture(
        lambda **o: HierarchicalMoE(2, 3, 4, gating="strictly_balanced", activation="tanh", **o)
    ),
    "NoisyTopKGating": gating(lambda **o: NoisyTopKGating(5, 2, seed=0, **o)),
    "SoftmaxGating": gating(lambda **o: SoftmaxGating(5, router_z_loss_weight=0.1, **o)),
    "StrictlyBalancedGating": gating(lambda **o: StrictlyBalancedGating(5, 2, **o)),
    "HierarchicalGating": gating(lambda **o: HierarchicalGating(2, 3, (1, 2), seed=0, **o)),
    "HierarchicalGating, static": gating(
        lambda **o: HierarchicalGating(2, 3, static_shapes=True, noise=False, **o)
    ),
    "HierarchicalBalancedGating": gating(lambda **o: HierarchicalBalancedGating(2, 3, **o)),
    "FeedForwardExperts": bank(
        lambda **o: FeedForwardExperts(3, 4, activation="tanh", use_bias=True, **o)
    ),
    "FeedForwardExperts, static": bank(
        lambda **o: FeedForwardExperts(3, [4, 5], static_shapes=True, activation="geglu", **o)
    ),
    "LayerExperts": bank(
        lambda **o: LayerExperts(3, expert(), **o), ("layers.0", "layers.2"), **NORMALIZED
    ),
    "ProjectedLSTM": Contract(
        lambda **o: ProjectedLSTM(4, 3, return_sequences=True, **o),
        ((2, 5, WIDTH),),
        parts=("cell",),
    ),
    "ProjectedLSTMCell": cell(),
    "AttentionLSTM, product": attention_lstm("product"),
    "AttentionLSTM, additive": attention_lstm("additive"),
    "ProductAttention": attention(ProductAttention),
    "AdditiveAttention": attention(AdditiveAttention),
    "SampledSoftmax": Contract(lambda **o: SampledSoftmax(7, 3, **o), ((2, 3, WIDTH),), masks={}),
}


def public_layers():
    """The classes of all layers that the package exports; its models are tested by themselves."""
    exported = [*vars(keras_moe).values(), *vars(keras_moe.layers).values()]
    classes = {value for value in exported if isinstance(value, type)}
    layers = {cls for cls in classes if issubclass(cls, keras.layers.Layer)}
    return {cls for cls in layers if not issubclass(cls, keras.Model)}


def floats(tensors):
    return [y for y in tensors if keras.backend.is_float_dtype(y.dtype)]


def loss_of(contract, layer, training=None):
    """A function of the inputs: the sum of the outputs' sines and of all losses; the outputs."""

    def loss(*inputs):
        outputs = contract.outputs(layer, *inputs, training=training)
        terms = [ops.sum(ops.sin(y)) for y in floats(outputs)] + layer.losses
        return sum(ops.cast(term, "float32") for term in terms), outputs

    loss.layer = layer
    return loss
