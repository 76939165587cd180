"""The dense layers of a model that mixtures could take the place of."""

import keras

from keras_moe.surgery import held_layers
from keras_moe.surgery.upcycling import is_activation, is_chain, is_linear


def dense_pairs(model):
    """Finds the pairs of dense layers in a model that `upcycle_model` could make mixtures of.

    A pair is a dense layer with an activation, then a linear one that takes as many units, in the
    same layer or model and with nothing between them that has weights: a feed-forward block, for
    most models, but the end of a classifier, too. Which of them really follow each other is seen
    by `upcycle_model`. Gated blocks, of three dense layers, are not found: a mixture cannot take
    their place.

    Example:
    ```python
    for i, (up, *_, down) in enumerate(keras_moe.dense_pairs(model)):
        print(i, up.path, tuple(up.kernel.shape), down.path, tuple(down.kernel.shape))
    ```

    Args:
        model: A built model of any class.

    Returns:
        List of lists of layers, as `upcycle` takes them, in the order of the model: two
        `keras.layers.Dense`, or three with an activation layer between them, where that of the
        first one is linear.

    Raises:
        ValueError: If the model is not built.
    """
    if not isinstance(model, keras.layers.Layer) or not model.built:
        raise ValueError(f"`model` must be a Keras model that is built. Received: {model!r}")
    pairs = []
    _find(model, pairs, set(), set())
    return pairs


def _find(layer, pairs, seen, used):
    """Adds the pairs in a layer; `seen` and `used` are ids of layers looked into, and in pairs."""
    if id(layer) in seen:
        return
    seen.add(id(layer))
    parts = list(held_layers.in_order(layer))
    for i, first in enumerate(parts):
        pair = [first]
        for part in parts[i + 1 :]:
            if is_activation(part) or isinstance(part, keras.layers.Dense):
                pair.append(part)
            if part.weights:
                break
        if is_chain(pair) and not is_linear(pair[:-1]) and used.isdisjoint(map(id, pair)):
            pairs.append(pair)
            used.update(map(id, pair))
        _find(first, pairs, seen, used)
