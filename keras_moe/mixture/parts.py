"""The parts of a mixture of experts, made or checked from the arguments of its layer."""

import inspect
import math

import keras
from keras import ops

from keras_moe import dispatch
from keras_moe.contract.freezing import TRAINABLE_PARTS
from keras_moe.experts import in_memory
from keras_moe.experts.feed_forward import FeedForwardExperts, is_bank
from keras_moe.experts.layer_experts import LayerExperts
from keras_moe.gating.noisy_top_k import NoisyTopKGating
from keras_moe.gating.softmax import SoftmaxGating
from keras_moe.gating.strictly_balanced import BalancedGating, StrictlyBalancedGating

# What a layer hands on to its default bank.
_FEED_FORWARD_ARGUMENTS = (
    "hidden_units",
    "output_dim",
    "activation",
    "use_bias",
    "kernel_initializer",
    "bias_initializer",
    "kernel_regularizer",
    "bias_regularizer",
    "recompute",
)


def make_gating(gating, num_experts, k, static_shapes, router_z_loss_weight, seed):
    """Returns the gating of a flat layer, by its name or as it is.

    Raises:
        ValueError: If `gating` is neither a known name nor a layer.
    """
    options = {"router_z_loss_weight": router_z_loss_weight, "name": "gating"}
    if gating == "noisy_top_k":
        return NoisyTopKGating(num_experts, k, seed=seed, **options)
    if gating == "softmax":
        return SoftmaxGating(num_experts, **options)
    if gating == "strictly_balanced":
        return StrictlyBalancedGating(num_experts, k, static_shapes=static_shapes, **options)
    names = '"noisy_top_k", "softmax", "strictly_balanced"'
    return check_gating(gating, names, router_z_loss_weight)


def check_gating(gating, names, router_z_loss_weight):
    """Returns a gating layer of the user's own.

    Raises:
        ValueError: If it is no layer, or is to have a z-loss that it alone could compute.
    """
    if not isinstance(gating, keras.layers.Layer):
        raise ValueError(f"`gating` must be {names} or a gating layer. Received: {gating!r}")
    if router_z_loss_weight:
        raise ValueError(
            "A gating layer of your own has to be given `router_z_loss_weight` itself. "
            f"Received, beside `gating`: {router_z_loss_weight}"
        )
    return gating


def make_experts(
    experts, num_experts, hidden_units, options, static_shapes, expert_parallel, dtype
):
    """Returns the bank of experts: feed-forward ones, clones of a layer, or a bank as it is.

    Args:
        experts: `None` for feed-forward experts, a layer to clone, or a bank.
        num_experts: N.
        hidden_units: Hidden units of feed-forward experts.
        options: All other arguments of feed-forward experts, by name.
        static_shapes: Whether the shapes of feed-forward experts must not depend on the data.
        expert_parallel: Whether each replica holds a part of the experts.
        dtype: The dtype policy.

    Raises:
        ValueError: If the arguments contradict each other.
    """
    if (hidden_units is None) == (experts is None):
        raise ValueError(
            "Give either `hidden_units`, for feed-forward experts, or `experts`, a layer or bank "
            f"of your own. Received: hidden_units={hidden_units}, experts={experts}"
        )
    common = {"dtype": dtype, "name": "experts"}
    if experts is None:
        return FeedForwardExperts(
            num_experts,
            hidden_units,
            **options,
            static_shapes=static_shapes,
            expert_parallel=expert_parallel,
            **common,
        )
    if not isinstance(experts, keras.layers.Layer):
        raise ValueError(
            "`experts` must be a Keras layer: a bank of experts, or what each expert becomes a "
            f"clone of. Received: {experts!r}"
        )
    defaults = inspect.signature(FeedForwardExperts.__init__).parameters
    idle = [name for name, value in options.items() if value != defaults[name].default]
    if idle:
        raise ValueError(
            "These arguments describe feed-forward experts; experts of your own have to be given "
            f"them themselves. Received, beside `experts`: {', '.join(idle)}"
        )
    if not is_bank(experts):
        experts = LayerExperts(num_experts, experts, **common)
    if getattr(experts, "expert_parallel", False) != expert_parallel:
        raise ValueError(
            "With `expert_parallel=True` a bank of your own has to be made with it, too; and "
            "`LayerExperts`, of which every expert is a layer, can't be divided among replicas. "
            f"Received: expert_parallel={expert_parallel}, and the bank {experts.name!r}, a "
            f"{type(experts).__name__} with expert_parallel={not expert_parallel}"
        )
    return experts


def make_shared_experts(bank, number):
    """Returns a bank like another, for `number` experts, or `None` for 0."""
    if number == 0:
        return None
    config = {**bank.get_config(), "num_experts": number, "name": "shared_experts"}
    config |= {"trainable": True}  # A frozen bank is a trained one; these begin anew.
    config.pop(TRAINABLE_PARTS, None)
    if "expert_parallel" in config:
        config["expert_parallel"] = False  # Every replica's examples need all of them.
    config.pop("changes", None)  # Those of single experts of the other bank.
    with in_memory.trusted():
        return type(bank).from_config(config)


def check_parts(layer):
    """Raises ValueError if the gating or the bank of a layer doesn't fit it."""
    for part in (layer.gating, layer.experts):
        check_number(part, "num_experts", layer.num_experts)
    if layer.expert_parallel:
        check_parallel(layer.gating)


def check_number(part, name, number):
    """Raises ValueError if a part is made for another number of experts, or of groups."""
    if getattr(part, name, number) != number:
        raise ValueError(
            f"The layer and its part {part.name!r} must have the same `{name}`. Received: "
            f"`{name}={number}`, and a part made for {getattr(part, name)}"
        )


def check_parallel(gating):
    """Raises ValueError for a gating that would have to see the examples of all replicas."""
    if isinstance(gating, BalancedGating):
        raise ValueError(
            "Strictly balanced gating takes the best examples of a whole batch, which no replica "
            "sees; leave out `expert_parallel`, or take another gating. Received: "
            f"expert_parallel=True, gating {gating.name!r}"
        )


def capacity_of(layer, routing):
    """The capacity of a layer's experts: a function from the number of examples to C."""

    def capacity(num_examples):
        # Of pairs the product; a gating of the user's own need not have the attribute.
        k = getattr(layer.gating, "k", ops.shape(routing.expert_index)[1])
        k = math.prod(k) if isinstance(k, (tuple, list)) else k
        return dispatch.expert_capacity(layer.capacity_factor, k, num_examples, layer.num_experts)

    return capacity


def config_of_parts(layer):
    """What stands in a layer's configuration of its gating and its experts."""
    serialize = keras.saving.serialize_keras_object
    if layer._gating_name:
        config = {
            "gating": layer._gating_name,
            "k": layer.k,
            "router_z_loss_weight": layer.router_z_loss_weight,
        }
    else:
        config = {"gating": serialize(layer.gating)}
    # A bank in int8 can't be made by the arguments of the layer.
    if not layer._feed_forward or layer.experts.quantization_mode is not None:
        parts = {"experts": layer.experts, "shared_experts": layer.shared_experts}
        return config | {name: serialize(p) for name, p in parts.items() if p is not None}
    bank = layer.experts.get_config()
    return config | {name: bank[name] for name in _FEED_FORWARD_ARGUMENTS}


def with_parts(config):
    """A copy of a configuration, with layers in place of the configurations of parts."""
    config = dict(config)
    for part in ("gating", "experts", "shared_experts"):
        if isinstance(config.get(part), dict):
            # Not built yet: `build` does that, also for a part without a `build` of its own.
            unbuilt = {key: v for key, v in config[part].items() if key != "build_config"}
            config[part] = keras.saving.deserialize_keras_object(unbuilt)
    return config
