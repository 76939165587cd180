"""Translations of strings by a trained model: in Python, and as signatures of an export."""

import batching
import numpy as np
import tensorflow as tf
from pair_batching import with_end
from vocabulary import EOS_ID, UNKNOWN_ID

MAX_PIECES = 256  # A source as long as a book would take all memory of a server.

# A server answers it before it lets a version in, since first requests are slow.
WARM_UP = {"serving_default": {"sentences": ["Good morning."]}}


class Translator:
    """Translates by beam search, the best translation of each source.

    Args:
        model: A built `TranslationModel`.
        pieces: The `WordPieces` of its vocabulary.
        **options: Keyword arguments of `TranslationModel.translate`.
    """

    def __init__(self, model, pieces, **options):
        self.model, self.pieces, self.options = model, pieces, options
        signature = [tf.TensorSpec([None, None], tf.int32)]
        self._in_graph = tf.function(self.translate, input_signature=signature, autograph=False)

    def translate(self, sources):
        """Translates a batch.

        Args:
            sources: int32 tensor [B, S], each with its end, padded with 0.

        Returns:
            The translations, string [B], and their scores, float32 [B].
        """
        found = self.model.translate(sources, EOS_ID, excluded=[UNKNOWN_ID], **self.options)
        return self.pieces.detokenize(found.ids[:, 0]), found.scores[:, 0]

    def translate_all(self, sources, words_per_batch):
        """Translates any number of sources, those of like length together.

        Args:
            sources: int32 `tf.RaggedTensor` [sources, (pieces)], each with its end.
            words_per_batch: The most positions of a batch, those of each hypothesis counted.

        Returns:
            A list of strings, in the order of the sources.
        """
        lengths = sources.row_lengths().numpy()
        longest = int(lengths.max())
        positions = max(longest, words_per_batch // self.options.get("beam_width", 4))
        translations = np.empty(len(lengths), object)
        for rows in batching.schedule(lengths, positions, longest, seed=None, epochs=1):
            strings, _ = self._in_graph(tf.gather(sources, rows).to_tensor())
            translations[rows] = [string.decode() for string in strings.numpy()]
        return translations.tolist()

    def signatures(self):
        """The signatures of an export, for `keras_moe.export_saved_model`.

        - `serving_default`: `sentences` string [B] to `translations` string [B] and their `scores`
          float32 [B]. Of a sentence of more than 255 word pieces the first 255 count. Requests of
          any lengths may be put together: each is translated as if it were alone.
        """

        def serve(sentences):
            ids = with_end(self.pieces.tokenize(sentences)[:, : MAX_PIECES - 1])
            # Also of no sentence, since an LSTM has to make a step.
            length = tf.maximum(ids.bounding_shape(axis=1, out_type=tf.int32), 1)
            translations, scores = self.translate(ids.to_tensor(shape=tf.stack([-1, length])))
            return {"translations": translations, "scores": scores}

        return {"serving_default": (serve, [tf.TensorSpec([None], tf.string)])}


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
