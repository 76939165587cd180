"""Checks of constructor arguments, worded alike in all layers."""

import operator


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


def check_weight(name, value):
    """Returns `value`, or raises ValueError unless it is a number that is not negative."""
    if not _is_number(value) or not value >= 0:
        raise ValueError(f"`{name}` must be a number, not negative. Received: {value!r}")
    return value


def check_capacity_factor(value):
    """Returns `value`, or raises ValueError unless it is `None` or a finite number above 0."""
    if value is None or _is_number(value) and 0 < value < float("inf"):
        return value
    raise ValueError(
        "`capacity_factor` must be a number above 0, or `None` to drop nothing. "
        f"Received: {value!r}"
    )


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _integer(value):
    """The value as an int, NumPy's integers included; `None` where it isn't one."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
