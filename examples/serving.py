"""What the demo's export answers: the signatures of a `LanguageModel` with its vocabulary."""

import tensorflow as tf
from vocabulary import EOS_ID, PADDING_ID

from keras_moe.serving import token_signature

MAX_WORDS = 255  # A sentence as long as a book would take all memory of a server.

# A server answers these before it lets a version in, since first requests are slow.
WARM_UP = {
    "serving_default": {"tokens": [[EOS_ID]], "lengths": [1]},
    "score": {"sentences": ["the"]},
    "next_words": {"sentences": ["the"]},
}


def sequences(lookup, sentences):
    """Sentences, words between spaces, as the model reads them.

    Args:
        lookup: A `keras.layers.StringLookup` from words to ids.
        sentences: String tensor [B]. Of a longer one the last 255 words count.

    Returns:
        Inputs and targets, int32 tensors [B, L]: the ids behind, and before, that of the end of
        the sentence, padded with 0.
    """
    ids = tf.cast(lookup(tf.strings.split(sentences)[:, -MAX_WORDS:]), tf.int32)
    eos = tf.fill([tf.shape(sentences)[0], 1], EOS_ID)
    inputs = tf.concat([eos, ids.to_tensor()], axis=1)
    return inputs, tf.concat([ids, eos], axis=1).to_tensor(shape=tf.shape(inputs))


def signatures(model, lookup):
    """The signatures of an export, for `keras_moe.export_saved_model`.

    All are safe where a server puts requests of several callers together, of any lengths.

    - `serving_default`: `tokens` int32 [B, L] and `lengths` int32 [B], how many of each row count,
      up to 256, to `probabilities` float32 [B, longest, V], those of the word after each position,
      0 behind a row's end, and `status` string [B], `"ok"` or the fault of a row without an answer
      (`keras_moe.serving.token_signature`).
    - `score`: `sentences` string [B] to `log_probabilities` float32 [B, longest], those of its
      words and of its end, and `lengths` int32 [B], how many these are. It is as wide as the
      longest sentence of the batch, also of other callers: behind a sentence's length there are
      zeros, to be cut off.
    - `next_words`: `sentences` string [B] to `words` and their `probabilities` [B, 5], the
      likeliest first.

    Args:
        model: A built `LanguageModel`.
        lookup: A `keras.layers.StringLookup` from words to ids.
    """
    vocabulary = tf.constant(lookup.get_vocabulary())

    def probabilities(tokens):
        return {"probabilities": tf.exp(model(tokens))}

    def score(sentences):
        inputs, targets = sequences(lookup, sentences)
        scores = tf.gather(model(inputs), targets, batch_dims=2)
        words = targets != PADDING_ID
        return {
            "log_probabilities": tf.where(words, scores, 0.0),
            "lengths": tf.reduce_sum(tf.cast(words, tf.int32), axis=1),
        }

    def next_words(sentences):
        inputs, _ = sequences(lookup, sentences)
        last = tf.reduce_sum(tf.cast(inputs != PADDING_ID, tf.int32), axis=1) - 1
        chances, best = tf.math.top_k(tf.exp(tf.gather(model(inputs), last, batch_dims=1)), 5)
        return {"words": tf.gather(vocabulary, best), "probabilities": chances}

    sentences = [tf.TensorSpec([None], tf.string)]
    return {
        "serving_default": token_signature(
            probabilities,
            [tf.TensorSpec([None, None], tf.int32)],
            vocabulary_size=model.vocabulary_size,
            max_length=MAX_WORDS + 1,
        ),
        "score": (score, sentences),
        "next_words": (next_words, sentences),
    }
