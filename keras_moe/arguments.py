"""Checks of constructor arguments, worded alike in all layers."""

import math
import numbers
import operator
import re


def check_size(name, value, least=1):
    """Returns `value` as an int, or raises ValueError unless it is an integer of at least 1."""
    size = _integer(value)
    if size is None or size < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}. Received: {value!r}")
    return size


def check_k(k, num_experts):
    """Returns `k` as an int, or raises ValueError unless it is an integer from 1 to N."""
    chosen = _integer(k)
    if chosen is None or not 1 <= chosen <= num_experts:
        raise ValueError(
            "`k`, the experts chosen per example, must be an integer between 1 and `num_experts`. "
            f"Received: k={k!r}, num_experts={num_experts}"
        )
    return chosen


def as_pair(k):
    """Returns `k` as two ints, or raises ValueError unless it is a pair of integers."""
    pair = [_integer(number) for number in k] if isinstance(k, (tuple, list)) else []
    if len(pair) != 2 or None in pair:
        raise ValueError(
            "`k` must be a pair of integers: the groups chosen per example, and the experts chosen "
            f"in each of them. Received: {k!r}"
        )
    return tuple(pair)


def check_pair(k, num_groups, experts_per_group):
    """Returns `k` as two ints, or raises ValueError unless they are within the sizes."""
    k = as_pair(k)
    if not (1 <= k[0] <= num_groups and 1 <= k[1] <= experts_per_group):
        raise ValueError(
            "`k`, the groups chosen per example and the experts chosen in each, must be "
            "between 1 and `num_groups` and between 1 and `experts_per_group`. Received: "
            f"k={k}, num_groups={num_groups}, experts_per_group={experts_per_group}"
        )
    return k


def as_sizes(name, value, least):
    """Returns `value` as ints, or raises ValueError unless it is as many integers as `least` has.

    Each must be at least what stands in the same place of `least`.
    """
    sizes = [_integer(number) for number in value] if isinstance(value, (tuple, list)) else []
    fit = len(sizes) == len(least) and None not in sizes
    if not fit or any(size < bound for size, bound in zip(sizes, least, strict=True)):
        raise ValueError(
            f"`{name}` must be {len(least)} integers, at least {least}. Received: {value!r}"
        )
    return tuple(sizes)


def check_weight(name, value):
    """Returns `value`, or raises ValueError unless it is a finite number, not negative."""
    if _is_finite(value) and value >= 0:
        return float(value)
    raise ValueError(f"`{name}` must be a number, not negative. Received: {value!r}")


def check_positive(name, value):
    """Returns `value`, or raises ValueError unless it is a finite number above 0."""
    if _is_finite(value) and value > 0:
        return float(value)
    raise ValueError(f"`{name}` must be a number above 0. Received: {value!r}")


def check_decay_rate(name, value):
    """Returns `value`, or raises ValueError unless it is a number of at least 0 and below 1."""
    if _is_finite(value) and 0 <= value < 1:
        return float(value)
    raise ValueError(f"`{name}` must be a number of at least 0 and below 1. Received: {value!r}")


def check_patterns(name, value):
    """Returns `value`, or raises ValueError unless it is `None` or a list of regular expressions.

    A tuple is returned as a list, which is what comes back from a file.
    """
    if value is None:
        return None
    if isinstance(value, (list, tuple)) and all(map(_is_pattern, value)):
        return list(value)
    raise ValueError(f"`{name}` must be a list of regular expressions. Received: {value!r}")


def check_capacity_factor(value):
    """Returns `value`, or raises ValueError unless it is `None` or a finite number above 0."""
    if value is None:
        return None
    if _is_finite(value) and value > 0:
        return float(value)
    raise ValueError(
        "`capacity_factor` must be a number above 0, or `None` to drop nothing. "
        f"Received: {value!r}"
    )


def _is_finite(value):
    """Whether the value is a real number, NumPy's included, that is neither infinite nor NaN."""
    return isinstance(value, numbers.Real) and type(value) is not bool and math.isfinite(value)


def _is_pattern(value):
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except re.error:
        return False


def _integer(value):
    """The value as an int, NumPy's integers included; `None` where it isn't one."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
