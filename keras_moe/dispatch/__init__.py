"""The way of the rows to their experts and back, and the products on it."""

from keras_moe.dispatch.plan import (
    Plan,
    as_batch,
    collect,
    combine,
    dispatch,
    expert_capacity,
    fraction,
    make_plan,
    of_one_example,
    ranks,
    rearrange,
    spread,
    take,
)

__all__ = [
    "Plan",
    "as_batch",
    "collect",
    "combine",
    "dispatch",
    "expert_capacity",
    "fraction",
    "make_plan",
    "of_one_example",
    "ranks",
    "rearrange",
    "spread",
    "take",
]
