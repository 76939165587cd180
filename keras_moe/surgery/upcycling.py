"""A mixture made of trained dense layers (Komatsuzaki et al., 2023)."""

import keras
from keras import ops

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
            them. All or none have biases. A hidden layer may have its activation in a layer behind
            it: `Activation`, `ReLU`, `LeakyReLU` or `ELU` of `keras.layers`.
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
    problem = _problem(layers)
    if problem:
        raise ValueError(problem)
    layers, activations = _dense_and_activations(layers)
    *hidden, last = layers
    determined = {
        "hidden_units": [layer.units for layer in hidden],
        "output_dim": last.units,
        "activation": activations[0],
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


def is_activation(layer):
    """Whether a layer is the activation of the dense one before it, and no more."""
    kinds = ("Activation", "ReLU", "LeakyReLU", "ELU")
    return isinstance(layer, tuple(getattr(keras.layers, kind) for kind in kinds))


def is_chain(layers):
    """Whether a list of layers is such as `upcycle` takes."""
    return _problem(layers) is None


def is_linear(layers):
    """Whether the hidden layers of a chain have no activation, so that it is one matrix."""
    _, activations = _dense_and_activations(layers)
    return all(map(_is_linear, activations))


def _dense_and_activations(layers):
    """Returns the dense layers, and for each its activation: a function, or a layer like it."""
    dense, activations = [], []
    for layer in layers:
        if not is_activation(layer):
            dense.append(layer)
            activations.append(layer.activation)
        elif isinstance(layer, keras.layers.Activation):
            activations[-1] = layer.activation
        else:
            activations[-1] = type(layer).from_config(layer.get_config())
    return dense, activations


def _problem(layers):
    """Says what is wrong with a chain of layers, or returns `None`."""
    before = None
    for layer in layers:
        if is_activation(layer):
            if not _is_linear(getattr(before, "activation", None)):
                return (
                    "An activation layer must stand behind a linear `keras.layers.Dense`, whose "
                    f"activation it is. Received: {layer!r} behind {before!r}"
                )
        elif not isinstance(layer, keras.layers.Dense) or layer.quantization_mode is not None:
            return f"Every layer must be a `keras.layers.Dense`, not quantized. Received: {layer!r}"
        elif not layer.built:
            return f"Call or build {layer.name!r} first: it has no weights to copy."
        before = layer
    layers, activations = _dense_and_activations(layers)
    if len(layers) < 2:
        return (
            "It takes at least one hidden layer, then the output layer. Received: "
            f"{len(layers)} layers"
        )
    shapes = [tuple(layer.kernel.shape) for layer in layers]
    if any(before[1] != after[0] for before, after in zip(shapes, shapes[1:], strict=False)):
        return f"Each layer must take what the one before it returns. Received: kernels {shapes}"
    if len({layer.use_bias for layer in layers}) > 1:
        uses = [layer.use_bias for layer in layers]
        return f"All layers or none must have a bias. Received: use_bias {uses}"
    if len({layer.trainable for layer in layers}) > 1:
        return (
            "All layers or none must be frozen, as a bank of experts is. Set `trainable` of all "
            "alike, and that of the new layer's parts afterwards. Received: trainable "
            f"{[layer.trainable for layer in layers]}"
        )
    *hidden, last = map(_described, activations)
    if any(activation != hidden[0] for activation in hidden):
        return f"The hidden layers must have one activation. Received: {hidden}"
    if not _is_linear(activations[-1]):
        return (
            "The last layer must be linear; put its activation behind the mixture instead. "
            f"Received: activation={last!r}"
        )
    return None


def _is_linear(activation):
    return activation == keras.activations.linear


def _described(activation):
    """What two activations that are alike have in common."""
    if isinstance(activation, keras.layers.Layer):
        config = activation.get_config()
        return type(activation).__name__, {key: config[key] for key in config if key != "name"}
    return keras.activations.serialize(activation)
