"""The most rows of an expert."""

import tensorflow as tf


def expert_capacity(factor, k, num_examples, num_experts):
    """C = min(T, ceil(factor·K·T / N)), the most rows of an expert.

    Args:
        factor: The capacity factor.
        k: K.
        num_examples: T, an integer, or an int32 scalar where the shape is not known yet.
        num_experts: N.

    Returns:
        An integer or an int32 scalar, as `num_examples`.
    """
    even_share = tf.cast(num_examples, tf.float64) * (factor * k) / num_experts
    capacity = tf.minimum(tf.cast(tf.math.ceil(even_share), tf.int32), num_examples)
    known = tf.get_static_value(capacity)
    return capacity if known is None else int(known)
