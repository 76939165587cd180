"""Translations of strings by a trained model: in Python, and as signatures of an export."""

import batching
import numpy as np
import tensorflow as tf
from pair_batching import with_end
from vocabulary import EOS_ID, UNKNOWN_ID

MAX_PIECES = 256  # A source as long as a book would take all memory of a server.

# A server answers it before it lets a version in, since first requests are slow.
WARM_UP = {"serving_default": {"sentences": ["Good morning."]}}


def translator(model, pieces, **options):
    """Returns a function that translates a batch.

    Args:
        model: A built `TranslationModel`.
        pieces: The `WordPieces` of its vocabulary.
        **options: Keyword arguments of `TranslationModel.translate`.

    Returns:
        A function from int32 [B, S], sources with their ends, to the best translation of each,
        string [B], and its score, float32 [B].
    """

    def translate(sources):
        found = model.translate(sources, EOS_ID, excluded=[UNKNOWN_ID], **options)
        return pieces.detokenize(found.ids[:, 0]), found.scores[:, 0]

    return translate


def signatures(model, pieces, **options):
    """The signatures of an export, for `keras_moe.export_saved_model`.

    - `serving_default`: `sentences` string [B] to `translations` string [B] and their `scores`
      float32 [B]. Of a sentence of more than 255 word pieces the first 255 count.

    Args:
        model: A built `TranslationModel`.
        pieces: The `WordPieces` of its vocabulary.
        **options: Keyword arguments of `TranslationModel.translate`.
    """
    translate = translator(model, pieces, **options)

    def serve(sentences):
        ids = with_end(pieces.tokenize(sentences)[:, : MAX_PIECES - 1])
        translations, scores = translate(ids.to_tensor())
        return {"translations": translations, "scores": scores}

    return {"serving_default": (serve, [tf.TensorSpec([None], tf.string)])}


def translate_all(model, pieces, sources, words_per_batch, **options):
    """Translates any number of sources, those of like length together.

    Args:
        model: A built `TranslationModel`.
        pieces: The `WordPieces` of its vocabulary.
        sources: int32 `tf.RaggedTensor` [sources, (pieces)] with their ends.
        words_per_batch: The most positions of a batch, times the width of the beam.
        **options: Keyword arguments of `TranslationModel.translate`.

    Returns:
        A list of strings, in the order of the sources.
    """
    signature = [tf.TensorSpec([None, None], tf.int32)]
    translate = tf.function(
        translator(model, pieces, **options), input_signature=signature, autograph=False
    )
    lengths = sources.row_lengths().numpy()
    longest = int(lengths.max())
    positions = max(longest, words_per_batch // options.get("beam_width", 4))
    translations = np.empty(len(lengths), object)
    for rows in batching.schedule(lengths, positions, longest, seed=None, epochs=1):
        strings, _ = translate(tf.gather(sources, rows).to_tensor())
        translations[rows] = [string.decode() for string in strings.numpy()]
    return translations.tolist()


def attention(model, source, words):
    """The attention with which a model writes given words.

    Args:
        model: A built `TranslationModel`.
        source: List of S ids with the end.
        words: List of T ids with the end.

    Returns:
        Float array [T, S]: a row for each word, which adds up to 1.
    """
    source = tf.constant([source])
    inputs = model.target_embedding(tf.constant([[EOS_ID, *words[:-1]]]))
    _, weights = model.attention_lstm(inputs, model.encode(source), return_attention_scores=True)
    return weights[0].numpy()
