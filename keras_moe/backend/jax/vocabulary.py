"""Samples of a vocabulary, and the cross-entropy of a word beside such a sample."""

import functools
import weakref

import jax
import jax.numpy as jnp
import keras
import numpy as np

_remembered = {}


class LogUniformSampler:
    """Draws words, common ones more often: word i of V with probability log((i+2)/(i+1))/log(V+1).

    Args:
        number: S, how many words to draw, each at most once.
        vocabulary_size: V.
        seed: Integer or `None`.

    Attributes:
        generator: Of the seeds; the layer has to hold it.
    """

    def __init__(self, number, vocabulary_size, seed):
        self.number, self.vocabulary_size = number, vocabulary_size
        self.generator = keras.random.SeedGenerator(seed)

    def __call__(self, targets, seed):
        """Returns the words, int32 [S], how often targets [T] and words are drawn on average.

        The seed is that of the generator from the beginning.
        """
        log_probs, chances = _chances(self.number, self.vocabulary_size)
        key = jax.random.wrap_key_data(jnp.asarray(self.generator.next(), "uint32"))
        # The largest with Gumbel noise are those that one after the other would draw.
        noise = jax.random.gumbel(key, [self.vocabulary_size])
        _, drawn = jax.lax.top_k(log_probs + noise, self.number)
        return (
            drawn,
            jnp.take(chances, jnp.asarray(targets, "int32"), mode="clip"),
            jnp.take(chances, drawn),
        )


@functools.cache
def _chances(number, vocabulary_size):
    """The logarithms of the probabilities of all words, and how likely each is in the sample.

    In n draws with words put back word i is with the chance 1 - (1 - p_i)^n; n is that for which
    these add up to the number of words to draw, as it is for the draws it takes on average.
    """
    word = np.arange(vocabulary_size, dtype="float64")
    probs = np.log((word + 2) / (word + 1)) / np.log(vocabulary_size + 1)

    def among(draws):
        return -np.expm1(draws * np.log1p(-probs)) if vocabulary_size > 1 else np.ones(1)

    low, high = 0.0, 1.0
    while high < 1e15 and among(high).sum() < number * (1 - 1e-12):
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if among(middle).sum() < number else (low, middle)
    return np.log(probs).astype("float32"), among(high).astype("float32")


def cross_entropy_beside(target, others):
    """-log of the softmax of one logit beside others: [T] and [T, S] to [T]."""
    logits = jnp.concatenate([target[:, None], others], axis=1)
    return jax.nn.logsumexp(logits, axis=1) - target


def cross_entropy(targets, logits):
    """-log of the softmax of the target's logit: int32 [T] and [T, V] to [T]."""
    target = jnp.take_along_axis(logits, targets[:, None], axis=1, mode="clip")[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - target


def remember(log_probs, hidden):
    """Has log-probabilities keep in mind the hidden states that they are computed from."""
    key = id(log_probs)  # JAX's arrays take no attributes.
    _remembered[key] = weakref.ref(log_probs, lambda _: _remembered.pop(key, None)), hidden


def remembered(log_probs):
    """Those hidden states, or `None`."""
    of_what, hidden = _remembered.get(id(log_probs), (lambda: None, None))
    return hidden if of_what() is log_probs else None


def words_alone(x, words):
    """The entries [B·L, ...] of [B, L, ...]: their number can't depend on how many are words."""
    return jnp.reshape(x, (-1, *x.shape[2:]))


def is_word(words):
    """Which entries of `words_alone` are those of words, bool [B·L]."""
    return jnp.reshape(words, -1)


def of_words(predictions, words):
    """The entry of each word: [B, L, V] and ids [B, L] to [B, L]."""
    return jnp.take_along_axis(predictions, words[..., None], axis=-1, mode="clip")[..., 0]
