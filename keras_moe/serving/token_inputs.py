"""Inputs that are ids of tokens: which of a model's inputs they are, and what may be sent."""

from typing import NamedTuple

import keras
import tensorflow as tf

from keras_moe.arguments import check_size
from keras_moe.serving.internals import layers_within

OK = "ok"  # the status of a row without a fault


class TokenInput(NamedTuple):
    """An input of ids.

    Attributes:
        spec: `tf.TensorSpec` of an integer dtype, with a name: [B, L] with L `None`, or any other
            shape that all requests have, in which all ids count.
        vocabulary_size: Ids are below it.
        lengths_name: Name of the input, int32 [B], that says how many ids each row has: what is
            behind is no token, and 0 is none. `None` where all requests have one shape.
        max_length: The most ids of a row, or `None`.
    """

    spec: tf.TensorSpec
    vocabulary_size: int
    lengths_name: str | None = None
    max_length: int | None = None

    def read(self, ids, lengths=None):
        """What the model may be called with, whatever comes in.

        Args:
            ids: Integer tensor [B, L], or of the one shape of all requests.
            lengths: int32 tensor [B], where ids have lengths.

        Returns:
            - ids of the input's dtype, in rows with a fault 0. Those with lengths have 0 behind the
              end, and are as wide as the longest row.
            - lengths int32 [B], 0 of rows with a fault; or `None`.
            - status string [B], `"ok"` or what the fault is, in words that are the same whatever
              was sent: who reads it may be somebody else.
        """
        if self.lengths_name is None:
            return self._read_all(ids)
        name, width = self.spec.name, tf.shape(ids)[1]
        most = width if self.max_length is None else tf.minimum(width, self.max_length)
        ids = tf.cast(ids[:, :most], tf.int64)
        place = tf.range(most)[None]
        inside = place < lengths[:, None]
        foreign = tf.logical_or(ids < 0, ids >= self.vocabulary_size)
        faults = {
            f"`{self.lengths_name}` must be at least 1": lengths < 1,
            f"`{self.lengths_name}` must not be above the width of `{name}`": lengths > width,
            f"`{name}` must have at most {self.max_length} ids": lengths > most,
            self._range: _any(tf.logical_and(inside, foreign)),
            f"`{name}` must not be padding alone": tf.logical_not(
                _any(tf.logical_and(inside, ids != 0))
            ),
        }
        status = _first(faults)
        lengths = tf.where(status == OK, lengths, 0)
        ids = tf.where(place < lengths[:, None], ids, 0)
        longest = tf.maximum(tf.reduce_max(lengths), 1)  # An LSTM has to make a step.
        ids = ids[:, :longest]
        ids = tf.pad(ids, [[0, 0], [0, longest - tf.shape(ids)[1]]])
        return tf.cast(ids, self.spec.dtype), lengths, status

    def _read_all(self, ids):
        wide = tf.cast(ids, tf.int64)
        foreign = _any(tf.logical_or(wide < 0, wide >= self.vocabulary_size))
        good = beside(tf.logical_not(foreign), ids)
        return tf.where(good, ids, tf.zeros_like(ids)), None, _first({self._range: foreign})

    @property
    def _range(self):
        return f"`{self.spec.name}` must be ids from 0 to {self.vocabulary_size - 1}"


def _any(is_so):
    return tf.reduce_any(is_so, axis=list(range(1, is_so.shape.rank)))


def _first(faults):
    """The status of each row: the text of the first fault that it has, string [B]."""
    status = tf.fill(tf.shape(next(iter(faults.values()))), OK)
    for text in reversed(faults):
        status = tf.where(faults[text], text, status)
    return status


def beside(mask, tensor):
    """A mask of the first axes of a tensor, in the tensor's rank."""
    return mask[(..., *[None] * (tensor.shape.rank - mask.shape.rank))]


def as_token_inputs(specs, model, vocabulary_size=None, max_length=None):
    """The inputs that are ids: integers [B, L], and others that have a vocabulary by name.

    Args:
        specs: List of `tf.TensorSpec`s with names.
        model: The model, or a function.
        vocabulary_size: Integer, or dict from names of inputs to integers, or to `None` for one
            that isn't ids. Default: the model's.
        max_length: Integer, or dict from names of inputs to integers, or `None`.

    Returns:
        A list as long as `specs`, of `TokenInput`s and, where an input is something else, `None`.

    Raises:
        ValueError: If there is no such input, or the size of its vocabulary is not known.
    """
    integers = [spec.name for spec in specs if spec.dtype.is_integer]
    ids = [spec.name for spec in specs if spec.name in integers and spec.shape.rank == 2]
    sizes = _by_name("vocabulary_size", vocabulary_size, integers, ids)
    ids = [name for name in integers if name in sizes or name in ids]
    ids = [name for name in ids if sizes.get(name, 0) is not None]
    if not ids:
        raise ValueError(
            "An input must be ids of tokens, integers [B, L]. Give the input signature, such as "
            f'[tf.TensorSpec([None, None], "int32", "tokens")]. Received: {specs!r}'
        )
    free = [s.name for s in specs if s.name in ids and s.shape[1:].as_list() == [None]]
    longest = _by_name("max_length", max_length, free, free)

    def as_input(spec):
        name = spec.name
        if name not in ids:
            return None
        size = sizes[name] if name in sizes else _vocabulary_size_of(model, name)
        if name not in free:
            return TokenInput(spec, size)
        lengths_name = "lengths" if len(free) == 1 else f"{name}_lengths"
        return TokenInput(spec, size, lengths_name, longest.get(name))

    return [as_input(spec) for spec in specs]


def _by_name(argument, value, known, default):
    """A dict from names to sizes, or to `None` where a dict says so."""
    if value is None:
        return {}
    values = value if isinstance(value, dict) else dict.fromkeys(default, value)
    if not known or not values.keys() <= set(known):
        raise ValueError(
            f"`{argument}` must have names of inputs of ids as keys: {', '.join(known)}. "
            f"Received: {value!r}"
        )
    return {k: None if v is None else check_size(argument, v) for k, v in values.items()}


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
