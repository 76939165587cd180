"""Samples of a vocabulary, and the cross-entropy of a word beside such a sample."""

import tensorflow as tf


class LogUniformSampler:
    """Draws words, common ones more often: word i of V with probability log((i+2)/(i+1))/log(V+1).

    Args:
        number: S, how many words to draw, each at most once.
        vocabulary_size: V.
        seed: Without effect: it stands in the graph of a call.
    """

    generator = None

    def __init__(self, number, vocabulary_size, seed):
        self.number, self.vocabulary_size = number, vocabulary_size

    def __call__(self, targets, seed):
        """Returns the words, int32 [S], how often targets [T] and words are drawn on average."""
        drawn, target_chances, chances = tf.random.log_uniform_candidate_sampler(
            tf.cast(targets, "int64")[:, None],
            num_true=1,
            num_sampled=self.number,
            unique=True,
            range_max=self.vocabulary_size,
            seed=seed,
        )
        return tf.cast(drawn, "int32"), target_chances[:, 0], chances


@tf.custom_gradient
def cross_entropy_beside(target, others):
    """-log of the softmax of one logit beside others: [T] and [T, S] to [T].

    TensorFlow's takes both in one tensor, and labels as large: copies that cost as much again.
    """
    largest = tf.maximum(tf.reduce_max(others, axis=1), target)
    target_share = tf.exp(target - largest)
    shares = tf.exp(others - largest[:, None])
    total = tf.reduce_sum(shares, axis=1) + target_share

    def gradient(upstream):
        scale = upstream / total
        return scale * target_share - upstream, scale[:, None] * shares

    return tf.math.log(total) + largest - target, gradient


def cross_entropy(targets, logits):
    """-log of the softmax of the target's logit: int32 [T] and [T, V] to [T]."""
    return tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)


def remember(log_probs, hidden):
    """Has log-probabilities keep in mind the hidden states that they are computed from."""
    log_probs.hidden_states = hidden


def remembered(log_probs):
    """Those hidden states, or `None`."""
    return getattr(log_probs, "hidden_states", None)


def words_alone(x, words):
    """The entries [W, ...] of [B, L, ...] that bool [B, L] has as words."""
    return x[words]


def is_word(words):
    """`None`: each entry of `words_alone` is that of a word."""
    return None


def of_words(predictions, words):
    """The entry of each word: [B, L, V] and ids [B, L] to [B, L]."""
    return tf.gather(predictions, words, batch_dims=2)
