"""New layers made of trained ones: from dense layers to experts, to more experts, to fewer.

Each function returns a new, built layer and leaves the layers it is given as they are. The name,
the losses' weights and all else in the configuration carry over, and what is frozen stays frozen;
the state of an optimizer does not, so compile the model that the new layer goes into anew.
"""

import operator

from keras import ops

from keras_moe.arguments import check_size
from keras_moe.contract.freezing import TRAINABLE_PARTS, copy_trainable
from keras_moe.experts import in_memory
from keras_moe.mixture.hierarchical_moe import HierarchicalMoE
from keras_moe.mixture.sparse_moe import SparseMoE


def grow(layer, num_experts, k=None):
    """Makes a layer with more experts: the old ones, then copies of them in turn.

    Old expert i is new expert i; the others are copies of 0, 1, … with their columns of the
    gating's weights. From N to 2N experts, together with k to 2k, the layer computes what it did
    before (k > 1, or the softmax gating, which needs no k): an expert and its copy have equal
    logits, are chosen together, and share the gate. (Not so where different experts have equal
    logits, as before any training.) The noise of the gating tells them apart in training. With any
    other number, or the same k, the copies take the places of other choices and the outputs change
    at first. Without noise equal experts with equal logits stay equal.

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
    units, unit_size = size_in_units(layer)
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
    units, _ = size_in_units(layer)
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


def size_in_units(layer):
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
    _, unit_size = size_in_units(layer)
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
