"""Signatures of ids of tokens for servers that put requests of different lengths together."""

import tensorflow as tf

from keras_moe.serving.padding import outputs_along
from keras_moe.serving.signatures import by_name, of_model, with_names
from keras_moe.serving.token_inputs import OK, as_token_inputs, beside, sizes_of_embeddings

STATUS = "status"


def token_signature(model, input_signature=None, *, vocabulary_size=None, max_length=None):
    """A signature of ids of tokens in which each row has its own length, and its own faults.

    A server with batching pads the shorter requests of a batch with their own first id, and fails
    all of them for the fault of one. So the signature has an input `lengths` besides, how many ids
    of each row count, and an output `status`: `"ok"`, or what is wrong with that row. The others
    get their answers.

    Example:
    ```python
    tokens = tf.TensorSpec([None, None], "int32", "tokens")
    signature = keras_moe.serving.token_signature(model, [tokens], max_length=256)
    keras_moe.export_saved_model(
        model, "saved_models/reviews", signatures={"serving_default": signature}
    )
    # {"inputs": {"tokens": [[5, 7, 2], [4, 0, 0]], "lengths": [3, 1]}}
    ```

    A row has a fault if its length is below 1, above the width of the ids or above `max_length`, if
    an id is negative or not in the vocabulary, or if there is nothing but padding. Its answers then
    are NaN; of integers -1, or the largest number where there are no negative ones; empty strings
    and `False`. Outputs with a position for each id, [B, L, ...], are as wide as the longest row of
    the batch without a fault, and 0 behind the end of each row: cut them off at its length. What
    the graph can't see is a length above the width of its own request, where others made the batch
    wider: it then counts ids that the server has padded with.

    Args:
        model: A built model, or a function of ids, as for `export_saved_model`. It is called with
            ids that are padded with 0, which it has to mask.
        input_signature: List with a spec, or a structure of them, for each argument. Integers
            [B, L] are ids, all else is passed on. Default: the model's own inputs, ids of any
            number in a row.
        vocabulary_size: Ids are below it. Default: `model.vocabulary_size`, or the size that all
            `keras.layers.Embedding`s of the model have. A dict from names of inputs where they
            differ; `None` in it for integers that are no ids.
        max_length: The most ids of a row, so that none takes all memory of a server; may be a dict,
            too.

    Returns:
        The function and its input signature, for `export_saved_model`. Of several inputs of ids
        each has lengths of its own, `NAME_lengths`. One of a fixed width has none: there is nothing
        to pad, and its ids are checked as they are.

    Raises:
        ValueError: If there are no ids among the inputs, or the size of their vocabulary is not
            known; if an answer depends on how far ids are padded, as without a mask, which is tried
            with a few; if an output has no entry for each row, or is called `status`.
    """
    if input_signature is None:
        model, input_signature = _of_any_length(*of_model(model))
    function, input_signature = with_names("token_signature", (model, input_signature))
    # What a tf.function has traced before reads other variables than those to be stored.
    function = getattr(function, "python_function", function)
    specs = tf.nest.flatten(input_signature)
    tokens = as_token_inputs(specs, model, vocabulary_size, max_length)
    with_lengths = [token.lengths_name for token in tokens if token and token.lengths_name]

    def call(flat):
        outputs = by_name(function(*tf.nest.pack_sequence_as(input_signature, flat)))
        if STATUS in outputs:
            raise ValueError(
                f"No output may be called {STATUS!r}, which tells the faults of rows. "
                f"Received: {sorted(outputs)}"
            )
        return outputs

    along = outputs_along(call, model, specs, tokens)

    def signature(*arguments):
        flat = tf.nest.flatten(arguments)
        checks = [_one_per_row(flat[0], x) for x in flat[1:]]
        flat, lengths = flat[: len(tokens)], flat[len(tokens) :]
        lengths = dict(zip(with_lengths, lengths, strict=True))
        read, statuses = {}, []
        with tf.control_dependencies(checks):
            for i, token in enumerate(tokens):
                if token is not None:
                    ids = tf.identity(flat[i])
                    flat[i], read[i], status = token.read(ids, lengths.get(token.lengths_name))
                    statuses.append(status)
        status = _first_fault(statuses)
        answers = {STATUS: status}
        for name, output in call(flat).items():
            output = tf.convert_to_tensor(output)
            if name in along:
                output = _inside(output, read[along[name]])
            answers[name] = _of_good_rows(output, status == OK)
        return answers

    lengths = [tf.TensorSpec([None], tf.int32, name) for name in with_lengths]
    return signature, [*input_signature, *lengths]


def _of_any_length(model, input_signature):
    """The inputs of a model, ids as integers of any number where it was not told otherwise."""
    (inputs,) = input_signature
    flat = tf.nest.flatten(inputs)
    if len(flat) == 1 and flat[0].shape.rank == 2 and sizes_of_embeddings(model):
        # A `Sequential` without `Input` takes ids for floats, and the width of its first batch.
        dtype = flat[0].dtype if flat[0].dtype.is_integer else tf.int32
        first_batch = model.inputs[0].shape[0] is not None
        width = None if first_batch else flat[0].shape[1]
        flat = [tf.TensorSpec([None, width], dtype, flat[0].name)]
    return model, [tf.nest.pack_sequence_as(inputs, flat)]


def _one_per_row(first, other):
    same = tf.shape(first)[0] == tf.shape(other)[0]
    return tf.debugging.Assert(same, ["All inputs must have the same number of rows."])


def _first_fault(statuses):
    status, *others = statuses
    for other in others:
        status = tf.where(status == OK, other, status)
    return status


def _inside(output, lengths):
    """An output [B, L, ...] with zeros behind the end of each row."""
    inside = tf.sequence_mask(lengths, tf.shape(output)[1])
    return tf.where(beside(inside, output), output, tf.zeros_like(output))


def _of_good_rows(output, is_good):
    """An output [B, ...], with what is no answer in the rows that have a fault."""
    dtype = output.dtype
    if dtype.is_floating:
        nothing = tf.constant(float("nan"), dtype)
    elif dtype.is_integer:
        nothing = tf.constant(-1 if dtype.min < 0 else dtype.max, dtype)
    else:
        nothing = tf.zeros([], dtype)
    return tf.where(beside(is_good, output), output, nothing)
