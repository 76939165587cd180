"""Exports a `WordModel` with its vocabulary: TensorFlow alone can load and query it."""

import os
import pathlib
import shutil

import keras
import tensorflow as tf
from text import EOS_ID, PADDING_ID


def tokens(lookup, sentences):
    """Beginnings of sentences, words between spaces, to the model's ids.

    Args:
        lookup: A `keras.layers.StringLookup` from words to ids.
        sentences: String tensor [B].

    Returns:
        int32 tensor [B, L], the end-of-sentence id first, padded with 0.
    """
    ids = tf.cast(lookup(tf.strings.split(sentences)), tf.int32)
    begin = tf.fill([tf.shape(sentences)[0], 1], EOS_ID)
    return tf.concat([begin, ids.to_tensor()], axis=1)


def check_target(path):
    """Raises ValueError if exporting to `path` would replace anything but an older export."""
    path = pathlib.Path(path)
    if path.exists() and not (path / "saved_model.pb").is_file():
        raise ValueError(
            "The folder for the export must be new, or hold an older export that is to be "
            f"replaced. Received: {str(path)!r}"
        )


def export(model, lookup, path):
    """Writes a SavedModel for TF Serving, under its final name only when it is complete.

    Signatures:
        `serving_default`: tokens int32 [B, L] to `probabilities` float32 [B, L, V], those of the
            word after each position.
        `next_words`: `sentences` string [B] to `words` and their `probabilities` [B, 5].

    Args:
        model: A built `WordModel`.
        lookup: A `keras.layers.StringLookup` from words to ids.
        path: Folder to write, which should be a version number. An older export is replaced.

    Returns:
        The path.

    Raises:
        ValueError: If `path` exists and is no export.
    """
    check_target(path)
    vocabulary = tf.constant(lookup.get_vocabulary())

    def probabilities(tokens):
        return {"probabilities": tf.exp(model(tokens))}

    def next_words(sentences):
        ids = tokens(lookup, sentences)
        last = tf.reduce_sum(tf.cast(ids != PADDING_ID, tf.int32), axis=1) - 1
        chances, best = tf.math.top_k(tf.exp(tf.gather(model(ids), last, batch_dims=1)), 5)
        return {"words": tf.gather(vocabulary, best), "probabilities": chances}

    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.track(lookup)
    archive.add_endpoint(
        "serving_default", probabilities, [tf.TensorSpec([None, None], tf.int32, "tokens")]
    )
    archive.add_endpoint("next_words", next_words, [tf.TensorSpec([None], tf.string, "sentences")])
    unfinished = f"{path}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    archive.write_out(unfinished, verbose=False)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(unfinished, path)
    return path
