"""New layers made of trained ones: from dense layers to experts, to more experts, to fewer.

Each function returns a new, built layer and leaves the layers it is given as they are. The name,
the losses' weights and all else in the configuration carry over, and what is frozen stays frozen;
the state of an optimizer does not, so compile the model that the new layer goes into anew.
"""

import operator

import keras
import numpy as np
from keras import ops

from keras_moe.arguments import check_size, check_weight
from keras_moe.contract.freezing import TRAINABLE_PARTS, copy_trainable
from keras_moe.experts import in_memory
from keras_moe.mixture import inspection as observation
from keras_moe.mixture.hierarchical_moe import HierarchicalMoE
from keras_moe.mixture.sparse_moe import SparseMoE


def upcycle(layers, num_experts, k=4, **kwargs):
    """Makes a `SparseMoE` of trained dense layers (Komatsuzaki et al., 2022).

    Every expert is a copy of the dense layers, and the gating begins at zero. While all experts
    are equal it does not matter which ones an example goes to, so that for k > 1, whose gates sum
    to 1, the new layer computes what the dense layers did (shared experts, if you ask for any,
    come on top). With k = 1 the gate is the probability of the expert among all N: at first the
    output is 1/N of that of the dense layers. The noise of the gating sends the examples to
    different experts, which so become different in training.

    Example, for a model in which the dense layer "up" feeds the dense layer "down":
    ```python
    dense = [model.get_layer("up"), model.get_layer("down")]
    new = {"up": keras_moe.upcycle(dense, 8, k=2), "down": keras.layers.Identity()}
    model = keras.models.clone_model(model, clone_function=lambda old: new.get(old.name, old))
    ```
    The new model shares all other layers with the old one.

    Args:
        layers: Built `keras.layers.Dense` layers, each the input of the next: one or several
            hidden layers of the same activation, then a linear one; or a `keras.Sequential` of
            them. All or none have biases.
        num_experts: N, the number of experts.
        k: K, the number of experts per example, from 1 to N.
        **kwargs: Other keyword arguments of `SparseMoE`. The dtype is that of the dense layers
            unless given; regularizers are not taken over, as they would count N times.

    Returns:
        A built `SparseMoE`.

    Raises:
        ValueError: If the layers are not such a chain, or `kwargs` has an argument that they
            determine.
    """
    layers = layers.layers if isinstance(layers, keras.Sequential) else list(layers)
    _check_chain(layers)
    *hidden, last = layers
    determined = {
        "hidden_units": [layer.units for layer in hidden],
        "output_dim": last.units,
        "activation": hidden[0].activation,
        "use_bias": last.use_bias,
    }
    taken = kwargs.keys() & {*determined, "experts"}
    if taken:
        raise ValueError(
            "The dense layers determine these arguments; leave them out. Received: "
            + ", ".join(sorted(taken))
        )
    kwargs = {"dtype": hidden[0].dtype_policy, **kwargs}
    moe = SparseMoE(num_experts, k=k, **determined, **kwargs)
    moe.build((None, hidden[0].kernel.shape[0]))
    if not last.trainable:
        moe.experts.trainable = False
    # One dense weight becomes N of a bank.
    for bank, layer in zip(moe.experts.kernels, layers, strict=True):
        bank.assign(ops.broadcast_to(layer.kernel, bank.shape))
    for bank, layer in zip(moe.experts.biases, layers if last.use_bias else [], strict=True):
        bank.assign(ops.broadcast_to(layer.bias, bank.shape))
    return moe


def grow(layer, num_experts, k=None):
    """Makes a layer with more experts: the old ones, then copies of them in turn.

    Old expert i is new expert i; the others are copies of 0, 1, … with their columns of the
    gating's weights. From N to 2N experts, together with k to 2k, the layer computes what it did
    before (k > 1, or the softmax gating, which needs no k): an expert and its copy have equal
    logits, are chosen together, and share the gate. The noise of the gating tells them apart in
    training. With any other number, or the same k, the copies take the places of other choices
    and the outputs change at first. Without noise equal experts with equal logits stay equal.

    Example:
    ```python
    moe = model.get_layer("moe")
    grown = keras_moe.grow(moe, 2 * moe.num_experts, k=2 * moe.k)
    model = keras.models.clone_model(model, clone_function=lambda old: grown if old is moe else old)
    ```
    The new model shares all other layers with the old one.

    Args:
        layer: A built `SparseMoE` or `HierarchicalMoE`. A gating layer of your own needs
            `num_experts` in its configuration and a method `expert_axis`, as in
            `NoisyTopKGating`; a bank of your own needs `num_experts` in its configuration and a
            method `copy_experts`, as in `FeedForwardExperts`.
        num_experts: The new number of experts, above the old one. A `HierarchicalMoE` is given
            whole groups: a multiple of `experts_per_group`.
        k: The new K, for `HierarchicalMoE` a pair. Defaults to the old one.

    Returns:
        A built layer of the same class and name.

    Raises:
        ValueError: If the layer is not built, `num_experts` not above that of the layer or not of
            whole groups, `k` out of range, or a part of your own lacks what is named above.
    """
    units, unit_size = _units(layer)
    num_experts = check_size("num_experts", num_experts)
    if num_experts <= layer.num_experts or num_experts % unit_size:
        raise ValueError(
            "`num_experts` must be above that of the layer"
            + (f", and a multiple of `experts_per_group={unit_size}`" if unit_size > 1 else "")
            + "; keras_moe.prune makes a layer with fewer experts. Received: "
            f"num_experts={num_experts}, for a layer with {layer.num_experts}"
        )
    return _rebuilt(layer, [i % units for i in range(num_experts // unit_size)], k)


def prune(layer, keep, k=None):
    """Makes a layer with some of the experts alone.

    Where the experts left out were never chosen, the outputs are the same. With k = 1, or the
    softmax gating, the gate of an expert is its share among all experts, so that it grows with
    every expert that is left out.

    Example, which keeps the experts that held-out data uses:
    ```python
    moe = model.get_layer("moe")
    used = keras_moe.used_experts(model, x_val)
    pruned = keras_moe.prune(moe, keep=used["moe"])
    model = keras.models.clone_model(
        model, clone_function=lambda old: pruned if old is moe else old
    )
    ```
    The new model shares all other layers with the old one.

    Args:
        layer: A layer as `grow` takes it.
        keep: Indices of the experts that stay, without repetition; expert `keep[i]` becomes
            expert i. Of a `HierarchicalMoE` the groups that stay.
        k: The new K, for `HierarchicalMoE` a pair. Defaults to the old one, which must not be
            larger than the number of experts, or of groups, that are left.

    Returns:
        A built layer of the same class and name.

    Raises:
        ValueError: If the layer is not built, `keep` is not a list of its experts, K is larger
            than what is left, or a part of your own lacks what `grow` asks for.
    """
    units, _ = _units(layer)
    try:
        indices = [operator.index(i) for i in keep]
    except TypeError:
        indices = []
    if not indices or len(set(indices)) < len(indices) or not set(indices) <= set(range(units)):
        raise ValueError(
            "`keep` must list experts (of a HierarchicalMoE groups) to be kept: integers from 0 "
            f"to {units - 1}, each once, at least one of them. Received: keep={keep!r}"
        )
    return _rebuilt(layer, indices, k)


def used_experts(model, x, min_share=0.0):
    """Finds the experts of a model that some data use, for `prune` to keep.

    Args:
        model: A built model.
        x: One batch, as the model takes it, or batches as in `callbacks.ExpertLoadReport`; no
            labels are needed.
        min_share: An expert counts as used if it gets more than this part of the even share of
            rows, K·T/N. 0: if it gets any.

    Returns:
        Dict from the name of each `SparseMoE` to an integer array, the used experts in order of
        index; of a `HierarchicalMoE` the groups with a used expert. Where a model calls a layer
        several times, its calls are summed.

    Raises:
        ValueError: If the model has no `SparseMoE`, `min_share` is negative, or `x` can be read
            only once or never ends.
    """
    check_weight("min_share", min_share)
    mixtures = observation.mixtures(model)
    loads = observation.load(model, observation.check_batches(x), mixtures)
    used = {}
    for name, load in loads.items():
        _, unit_size = _units(mixtures[name])
        units = (load > min_share * load.mean()).reshape(-1, unit_size)
        used[name] = np.flatnonzero(units.any(axis=1))
    return used


def _check_chain(layers):
    for layer in layers:
        if not isinstance(layer, keras.layers.Dense) or layer.quantization_mode is not None:
            raise ValueError(
                f"Every layer must be a `keras.layers.Dense`, not quantized. Received: {layer!r}"
            )
        if not layer.built:
            raise ValueError(f"Call or build {layer.name!r} first: it has no weights to copy.")
    if len(layers) < 2:
        raise ValueError(
            "It takes at least one hidden layer, then the output layer. Received: "
            f"{len(layers)} layers"
        )
    *hidden, last = layers
    shapes = [tuple(layer.kernel.shape) for layer in layers]
    problem = None
    if any(before[1] != after[0] for before, after in zip(shapes, shapes[1:], strict=False)):
        problem = f"Each layer must take what the one before it returns. Received: kernels {shapes}"
    elif len({layer.use_bias for layer in layers}) > 1:
        uses = [layer.use_bias for layer in layers]
        problem = f"All layers or none must have a bias. Received: use_bias {uses}"
    elif len({layer.trainable for layer in layers}) > 1:
        problem = (
            "All layers or none must be frozen, as a bank of experts is. Set `trainable` of all "
            "alike, and that of the new layer's parts afterwards. Received: trainable "
            f"{[layer.trainable for layer in layers]}"
        )
    elif any(layer.activation != hidden[0].activation for layer in hidden):
        activations = [keras.activations.serialize(layer.activation) for layer in hidden]
        problem = f"The hidden layers must have one activation. Received: {activations}"
    elif last.activation != keras.activations.linear:
        problem = (
            "The last layer must be linear; put its activation behind the mixture instead. "
            f"Received: activation={keras.activations.serialize(last.activation)!r}"
        )
    if problem:
        raise ValueError(problem)


def _units(layer):
    """How many parts of a layer can be added or left out, and how many experts such a part has."""
    if not isinstance(layer, SparseMoE):
        raise ValueError(f"`layer` must be a SparseMoE or HierarchicalMoE. Received: {layer!r}")
    if not layer.built:
        raise ValueError(f"Call or build {layer.name!r} first: it has no weights to copy.")
    if isinstance(layer, HierarchicalMoE):
        return layer.num_groups, layer.experts_per_group
    return layer.num_experts, 1


def _rebuilt(layer, origins, k):
    """A layer like `layer`, part i of which (an expert, or a group) is a copy of origins[i]."""
    with in_memory.trusted():
        return _rebuilt_in_memory(layer, origins, k)


def _rebuilt_in_memory(layer, origins, k):
    _, unit_size = _units(layer)
    experts = [unit_size * i + j for i in origins for j in range(unit_size)]
    sizes = {"num_groups": len(origins), "num_experts": len(experts)}
    grouped = hasattr(layer.gating, "num_groups")

    # The parts of the user's own stand in the configuration as a whole, the others by arguments.
    config = layer.get_config()
    config.pop(TRAINABLE_PARTS, None)  # Numbers of experts that won't be theirs.
    gating = _resized(layer.gating, sizes)
    if not hasattr(layer.experts, "copy_experts"):
        raise ValueError(
            f"The bank {layer.experts.name!r} cannot copy experts. Give "
            f"{type(layer.experts).__name__} a method `copy_experts(bank, origins)`, as in "
            "FeedForwardExperts."
        )
    _set_k(gating, k, len(origins) if grouped else len(experts))
    config.update({name: size for name, size in sizes.items() if name in config})
    if isinstance(config["gating"], dict):
        config["gating"] = type(layer.gating).from_config(gating)
    elif "k" in gating:
        config["k"] = gating["k"]
    if "experts" in config:
        bank = _resized(layer.experts, sizes)
        if "changes" in bank:
            bank["changes"] = [bank["changes"][i] for i in experts]
        config["experts"] = type(layer.experts).from_config(bank)

    new = type(layer).from_config(config)
    new.build_from_config(layer.get_build_config())
    _copy_weights(layer.gating, new.gating, origins if grouped else experts)
    copy_trainable(layer.gating, new.gating)
    new.experts.trainable = layer.experts.trainable
    new.experts.copy_experts(layer.experts, experts)
    if layer.shared_experts is not None:
        new.shared_experts.set_weights(layer.shared_experts.get_weights())
        copy_trainable(layer.shared_experts, new.shared_experts)
    return new


def _resized(part, sizes):
    """The configuration of a gating layer or a bank, with other numbers of experts."""
    config = part.get_config()
    config.pop(TRAINABLE_PARTS, None)
    resized = {name: size for name, size in sizes.items() if name in config}
    if not resized:
        raise ValueError(
            f"The configuration of {part.name!r} does not say how many experts it is made for. "
            f"Put `num_experts` into what `{type(part).__name__}.get_config` returns."
        )
    return {**config, **resized}


def _set_k(gating, k, available):
    """Puts K into the configuration of a gating layer, in which there are `available` choices."""
    if k is not None:
        if "k" not in gating:
            raise ValueError(f"The gating has no `k` in its configuration. Received: k={k}")
        gating["k"] = k
    k = gating.get("k", 0)
    chosen = k[0] if isinstance(k, (tuple, list)) else k
    if chosen > available:
        raise ValueError(
            f"Each example is to choose {chosen} of {available}: give a smaller `k`, or keep more. "
            f"Received: k={k}"
        )


def _copy_weights(source, target, origins):
    """Gives entry i of the target, along the axis of the experts, the values of origins[i]."""
    if source.weights and not hasattr(source, "expert_axis"):
        raise ValueError(
            f"The gating {source.name!r} does not say which of its weights belong to one expert. "
            f"Give {type(source).__name__} a method `expert_axis(variable)`: the axis along which "
            "a weight has one entry for each expert, or None where it has not."
        )
    for old, new in zip(source.weights, target.weights, strict=True):
        axis = source.expert_axis(old)
        value = old if axis is None else ops.take(old, origins, axis=axis)
        if tuple(value.shape) != tuple(new.shape):
            raise ValueError(
                f"The shape of {old.name} depends on the number of experts in another way than "
                f"`{type(source).__name__}.expert_axis` says. Received: expert_axis {axis}, shape "
                f"{tuple(old.shape)} before and {tuple(new.shape)} after"
            )
        new.assign(value)
