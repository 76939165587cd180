"""Inputs that are ids of tokens: which of a model's inputs they are, and what may be sent."""

from typing import NamedTuple

import keras
import tensorflow as tf

from keras_moe.arguments import check_size
from keras_moe.serving.internals import layers_within

OK = "ok"  # the status of a row without a fault


class TokenInput(NamedTuple):
    """An input of ids. What stands behind the end of a row, and 0, is no token.

    Attributes:
        spec: `tf.TensorSpec` [B, L] of an integer dtype, with a name. L is `None`, or the one
            width that the model takes.
        lengths_name: Name of the input, int32 [B], that says how many ids each row has.
        vocabulary_size: Ids are below it.
        max_length: The most ids of a row, or `None`.
    """

    spec: tf.TensorSpec
    lengths_name: str
    vocabulary_size: int
    max_length: int | None

    def read(self, ids, lengths):
        """What the model may be called with, whatever comes in.

        Args:
            ids: Integer tensor [B, L].
            lengths: int32 tensor [B].

        Returns:
            - ids of the input's dtype, 0 behind the end; as wide as the longest row, unless the
              model takes one width alone. A row with a fault has none.
            - lengths int32 [B], 0 of rows with a fault.
            - status string [B], `"ok"` or what the fault is, in words that are the same whatever
              was sent: who reads it may be somebody else.
        """
        name, width = self.spec.name, tf.shape(ids)[1]
        most = width if self.max_length is None else tf.minimum(width, self.max_length)
        ids = tf.cast(ids[:, :most], tf.int64)
        place = tf.range(most)[None]
        inside = place < lengths[:, None]
        foreign = tf.logical_or(ids < 0, ids >= self.vocabulary_size)
        faults = {  # The first that a row has.
            f"`{self.lengths_name}` must be at least 1": lengths < 1,
            f"`{self.lengths_name}` must not be above the width of `{name}`": lengths > width,
            f"`{name}` must have at most {self.max_length} ids": lengths > most,
            f"`{name}` must be ids from 0 to {self.vocabulary_size - 1}": _any(inside, foreign),
            f"`{name}` must not be padding alone": tf.logical_not(_any(inside, ids != 0)),
        }
        status = tf.fill(tf.shape(lengths), OK)
        for text in reversed(faults):
            status = tf.where(faults[text], text, status)
        lengths = tf.where(status == OK, lengths, 0)
        ids = tf.where(place < lengths[:, None], ids, 0)
        if self.spec.shape[1] is None:
            longest = tf.maximum(tf.reduce_max(lengths), 1)  # An LSTM has to make a step.
            ids = ids[:, :longest]
            ids = tf.pad(ids, [[0, 0], [0, longest - tf.shape(ids)[1]]])
        return tf.cast(ids, self.spec.dtype), lengths, status


def _any(inside, is_so):
    return tf.reduce_any(tf.logical_and(inside, is_so), axis=1)


def as_token_inputs(specs, model, vocabulary_size=None, max_length=None):
    """The inputs that are ids: integers [B, L].

    Args:
        specs: List of `tf.TensorSpec`s with names.
        model: The model, or a function.
        vocabulary_size: Integer, or dict from names of inputs to integers. Default: the model's.
        max_length: Integer, or dict from names of inputs to integers, or `None`.

    Returns:
        A list as long as `specs`, of `TokenInput`s and, where an input is something else, `None`.

    Raises:
        ValueError: If there is no such input, or the size of its vocabulary is not known.
    """
    are_ids = [spec.dtype.is_integer and spec.shape.rank == 2 for spec in specs]
    names = [spec.name for spec, is_so in zip(specs, are_ids, strict=True) if is_so]
    if not names:
        raise ValueError(
            "An input must be ids of tokens, integers [B, L]. Give the input signature, such as "
            f'[tf.TensorSpec([None, None], "int32", "tokens")]. Received: {specs!r}'
        )
    sizes = _by_name("vocabulary_size", vocabulary_size, names)
    longest = _by_name("max_length", max_length, names)

    def as_input(spec):
        return TokenInput(
            spec,
            "lengths" if len(names) == 1 else f"{spec.name}_lengths",
            sizes.get(spec.name) or _vocabulary_size_of(model, spec.name),
            longest.get(spec.name),
        )

    return [as_input(s) if is_so else None for s, is_so in zip(specs, are_ids, strict=True)]


def _by_name(argument, value, names):
    values = value if isinstance(value, dict) else dict.fromkeys(names, value)
    if not values.keys() <= set(names):
        raise ValueError(
            f"`{argument}` must have names of inputs of ids as keys: {', '.join(names)}. "
            f"Received: {value!r}"
        )
    return {name: check_size(argument, v) for name, v in values.items() if v is not None}


def _vocabulary_size_of(model, name):
    """That of a model of words, or else of the embeddings of any model."""
    known = {getattr(model, "vocabulary_size", None)} - {None} or sizes_of_embeddings(model)
    if len(known) != 1:
        raise ValueError(
            "`vocabulary_size` must be given where the model's embeddings don't tell it: a number, "
            f"or a dict with {name!r}. Received: {model!r}, with embeddings of {sorted(known)} ids"
        )
    return known.pop()


def sizes_of_embeddings(model):
    """The set of the numbers of ids that embeddings of a model, or none of a function, have."""
    layers = layers_within(model) if isinstance(model, keras.layers.Layer) else []
    return {layer.input_dim for layer in layers if isinstance(layer, keras.layers.Embedding)}
