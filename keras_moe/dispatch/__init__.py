"""The way of the rows to their experts and back, and the products on it.

`plan.py` gives each choice of an example its row, `rows.py` moves the rows, `grouped_products.py`
multiplies each by the matrix of its expert: by `loops.py` on CPUs, `places.py` on GPUs, `blocks.py`
where XLA needs static shapes. `devices.py` is where the device chooses.
"""

from keras_moe.dispatch.capacity import expert_capacity
from keras_moe.dispatch.plan import Plan, fraction, make_plan, ranks
from keras_moe.dispatch.rows import (
    as_batch,
    collect,
    combine,
    dispatch,
    of_one_example,
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
