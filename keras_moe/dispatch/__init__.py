"""The way of the rows to their experts and back.

`plan.py` gives each choice of an example its row, `rows.py` moves the rows, `products.py`
multiplies each by the matrix of its expert: by the backend's grouped products, or by `blocks.py`
where TensorFlow has to have static shapes for XLA. `capacity.py` is the rule of how many rows an
expert takes.
"""

from keras_moe.backend import indices
from keras_moe.dispatch.capacity import expert_capacity
from keras_moe.dispatch.plan import Choices, Plan, fraction, make_plan, ranks
from keras_moe.dispatch.rows import (
    as_batch,
    collect,
    combine,
    dispatch,
    of_one_example,
    rearrange,
    take,
)

spread = indices.spread

__all__ = [
    "Choices",
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
