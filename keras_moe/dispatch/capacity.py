"""The most rows of an expert."""

import math

from keras import ops


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
    if isinstance(k, int) and isinstance(num_examples, int):
        return min(math.ceil(num_examples * (factor * k) / num_experts), num_examples)
    even_share = ops.cast(num_examples, "float64") * (factor * ops.cast(k, "float64"))
    even_share /= num_experts
    return ops.minimum(ops.cast(ops.ceil(even_share), "int32"), num_examples)
