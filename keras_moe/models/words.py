"""Ids of words, which of them are padding, and what each weighs."""

import keras
import numpy as np
from keras import ops

from keras_moe.backend import indices

PADDING_ID = 0


def as_ids(ids):
    """Ids of whatever type a data set stores them in, as uint16 or float32, as an int32 tensor."""
    return ops.cast(ops.convert_to_tensor(ids), "int32")


def mask_padding(predictions, targets):
    """The predictions [B, L, V] with Keras' mask: losses and metrics then leave out padding."""
    mask = targets != PADDING_ID
    return keras.layers.Lambda(lambda x: x, mask=mask, dtype=predictions.dtype)(predictions)


def weights_of_words(sample_weight, targets):
    """The weight of each word.

    Args:
        sample_weight: Tensor [B], [B, 1] or [B, L], or `None`.
        targets: Integer tensor [B, L].

    Returns:
        Float tensor [B, L], or `None`.

    Raises:
        ValueError: If the weights are of another shape.
    """
    if sample_weight is None:
        return None
    weights = ops.cast(ops.convert_to_tensor(sample_weight), keras.config.floatx())
    # Of unknown rank where the same step had weights of texts before and has those of words now.
    shape = (None, None) if getattr(weights.shape, "rank", 0) is None else weights.shape
    fits = all(w in (n, 1, None) or n is None for w, n in zip(shape, targets.shape, strict=False))
    if len(shape) not in (1, 2) or not fits:
        raise ValueError(
            "`sample_weight` must have a weight for each text, [B], or for each word, [B, L]. "
            f"Received: shape {tuple(shape)} for targets {tuple(targets.shape)}"
        )
    # By the number of texts: else those of [B] would be broadcast along the words.
    size, number = ops.shape(targets)[0], ops.size(weights)
    columns = indices.at_least(1, number // indices.at_least(1, size))
    return ops.broadcast_to(ops.reshape(weights, (size, columns)), ops.shape(targets))


def table_of_weights(class_weight, vocabulary_size):
    """The weight of each id, a NumPy array [V], 1 where none is given; `None` for no weights.

    Raises:
        ValueError: If a weight is given to what is no id.
    """
    if class_weight is None:
        return None
    if not class_weight.keys() <= set(range(vocabulary_size)):
        raise ValueError(
            f"`class_weight` must have ids below {vocabulary_size} as keys. "
            f"Received: {class_weight!r}"
        )
    weights = [class_weight.get(i, 1.0) for i in range(vocabulary_size)]
    return np.array(weights, keras.config.floatx())
