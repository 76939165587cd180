"""Losses and metrics of Keras for predictions that are log-probabilities.

A cross-entropy of Keras takes predictions for probabilities unless `from_logits` is set. Of
log-probabilities it would make a constant, without an error. They are logits, too: their softmax is
what they are the logarithm of.
"""

import keras

_CROSS_ENTROPY = "sparse_categorical_crossentropy"
_NAMES = {_CROSS_ENTROPY, "SparseCategoricalCrossentropy"}
_SHORT_NAMES = {"crossentropy", "ce"}  # Keras chooses by the shape of the targets, here of ids.


def for_log_probabilities(given, is_loss):
    """What `compile` is given, with its cross-entropies by ids taking log-probabilities.

    Args:
        given: A loss or metric, or a structure of them: names, functions and objects.
        is_loss: Whether they are losses.

    Returns:
        The same structure, with objects that compute from logits in place of cross-entropies.

    Raises:
        ValueError: If a metric has been made for probabilities.
    """
    kind = (keras.losses if is_loss else keras.metrics).SparseCategoricalCrossentropy

    def convert(part):
        if part is keras.losses.sparse_categorical_crossentropy:
            part = _CROSS_ENTROPY
        if isinstance(part, str) and (part in _NAMES or part.lower() in _SHORT_NAMES):
            return kind(name=part, from_logits=True)
        if type(part) is not kind or part.get_config()["from_logits"]:
            return part
        if is_loss:
            return kind.from_config({**part.get_config(), "from_logits": True})
        raise ValueError(  # Its caller may read the result of this very object.
            "The predictions are log-probabilities: make the metric with `from_logits=True`. "
            f"Received: {part!r}"
        )

    return keras.tree.map_structure(convert, given)
