"""Mixtures in the place of dense layers all over a trained model."""

import itertools

import keras
import numpy as np
from keras import ops

from keras_moe.surgery import held_layers
from keras_moe.surgery.comparison import Batch
from keras_moe.surgery.replacement import replace_layers
from keras_moe.surgery.upcycling import upcycle


def upcycle_model(model, pairs, num_experts, k=4, *, x=None, in_place=False, **kwargs):
    """Makes mixtures of the dense layers that you choose in a trained model.

    At first the new model computes what the old one does: every expert is a copy of the dense
    layers, as by `upcycle`, and where the first gates do not sum to 1, as with k = 1, the experts'
    last weights are divided by their sum. Shared experts begin at zero. That the outputs are equal
    is checked on one batch. Masked positions are an exception: there a mixture gives zeros.

    Works for `Sequential` and Functional models, also in each other; for layers and models of any
    class that hold the dense layers as attributes, in lists or dicts too, such as
    `keras_hub.layers.TransformerDecoder`; and so for the backbones of keras-hub.

    Example, a mixture in every other feed-forward block:
    ```python
    pairs = keras_moe.dense_pairs(model)
    model = keras_moe.upcycle_model(model, pairs[1::2], num_experts=8, k=2)
    model.compile("adam", "mse")
    ```
    A layer of a class of its own gets the class of a layer with replaced parts, which inherits from
    the one it had, so that it can be saved and loaded. In each pair the first layer becomes the
    mixture and the others `keras.layers.Identity`. A `Dropout` between them stays where it is, now
    behind the mixture. `fit` calls a model whose `call` takes no `training` as for predictions; the
    new one it calls as in training, for the sake of the noise, and so all else inside it.

    Args:
        model: A built model of any class.
        pairs: List of chains of layers inside the model, each as `upcycle` takes it: some of what
            `dense_pairs` finds, or your own. No layer is in two of them.
        num_experts: N, the number of experts of each mixture.
        k: K, the number of experts per example, from 1 to N.
        x: One batch as the model takes it, without padding, to compare the outputs. Default: one of
            the shape the model was built for, normal numbers, or ones where it takes integers.
        in_place: Whether to change the model itself, for one that cannot be copied: whose class has
            no `get_config`, or whose layers hold each other's weights. Not for models of the
            Functional API and `Sequential` ones, which have to be built again. What other models,
            or functions of your own, have traced of it before stays as it was traced.
        **kwargs: Other keyword arguments of `SparseMoE`. The mixtures' names are `name`, by default
            "moe", followed by their number but for the first; of `seed` each has the next one.

    Returns:
        A model of the same class and name, which has to be compiled anew. It shares nothing with
        `model`, unless it is the same one.

    Raises:
        ValueError: If a chain is not such as `upcycle` takes, or not inside the model; where it
            cannot be replaced; if the model cannot be copied; or if the outputs would differ, as
            when the layers of a chain are not called one after the other.
    """
    if not isinstance(model, keras.layers.Layer) or not model.built:
        raise ValueError(f"`model` must be a Keras model that is built. Received: {model!r}")
    pairs = _check_pairs(pairs)
    batch = Batch(model, x)
    names = _names(model, kwargs.pop("name", None) or "moe", len(pairs))
    new = []
    for i, (first, *rest) in enumerate(pairs):
        options = {**kwargs, "name": names[i]}
        if kwargs.get("seed") is not None:
            options["seed"] = kwargs["seed"] + i  # Else all would draw the same noise.
        new.append((first, _mixture([first, *rest], num_experts, k, **options)))
        for layer in rest:
            dtype = layer.dtype_policy.name  # Keras couldn't write down the policy itself.
            new.append((layer, keras.layers.Identity(name=layer.name, dtype=dtype)))

    def check(result):
        problem = batch.difference(result)
        if problem:
            raise ValueError(
                "The outputs of the model would change. Each layer of a chain must be called with "
                "what the one before it returns, without anything computed in between, as a gated "
                "activation is, and nothing else may use that; and a gating of your own must give "
                f"all experts as much at first. Received: {problem}"
            )

    return replace_layers(model, new, check, in_place)


def _check_pairs(pairs):
    pairs = [list(pair) if isinstance(pair, (list, tuple)) else pair for pair in pairs]
    if not pairs or not all(isinstance(pair, list) and pair for pair in pairs):
        raise ValueError(
            "`pairs` must be a list of chains of layers, as `keras_moe.dense_pairs(model)` finds "
            f"them, at least one. Received: {pairs!r}"
        )
    layers = [layer for pair in pairs for layer in pair]
    twice = {layer.name for layer in layers if sum(layer is other for other in layers) > 1}
    if twice:
        raise ValueError(f"A layer can be in one chain, once. Received twice: {sorted(twice)}")
    return pairs


def _names(model, name, number):
    """Names for the mixtures that no layer of the model has."""
    taken = {layer.name for layer in held_layers.flattened(model)}
    names = (f"{name}_{i}" if i else name for i in itertools.count())
    return list(itertools.islice((name for name in names if name not in taken), number))


def _mixture(layers, num_experts, k, **kwargs):
    """The mixture that `upcycle` makes, giving at first what the dense layers gave."""
    moe = upcycle(layers, num_experts, k, **kwargs)
    gates = moe.route(np.zeros((1, layers[0].kernel.shape[0]), "float32")).gates
    total = float(ops.sum(gates))
    if total > 0 and abs(total - 1) > 1e-6:
        for variable in (moe.experts.kernels[-1], *moe.experts.biases[-1:]):
            variable.assign(variable / total)
    if moe.shared_experts is not None:
        for variable in (*moe.shared_experts.kernels[-1:], *moe.shared_experts.biases[-1:]):
            variable.assign(ops.zeros(variable.shape, variable.dtype))
    return moe
