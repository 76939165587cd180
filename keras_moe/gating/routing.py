"""What a gating layer decides: the chosen experts of each example, their gates, the balance."""

from typing import Any, NamedTuple

import keras
from keras import ops

from keras_moe import losses


class Routing(NamedTuple):
    """The decision of a gating layer for one batch.

    A choice with gate 0 counts for nothing: its row reaches no expert.

    Attributes:
        expert_index: int32 [T, K], the chosen experts.
        gates: float32 [T, K], their weights G(x).
        importance: float32 [N], the sum of the gates per expert (equation 6).
        load: float32 [N], the smooth estimator of the rows per expert in noisy training
            (equation 10), the number of rows otherwise.
    """

    expert_index: Any
    gates: Any
    importance: Any
    load: Any


def make_routing(expert_index, gates, num_experts, mask=None, chances=None):
    """Takes masked examples out of the gates and measures the balance of what is left.

    Args:
        expert_index: Integer tensor [T, K].
        gates: float32 tensor [T, K].
        num_experts: N.
        mask: Boolean tensor [T] or `None`; examples with `False` get gates of 0.
        chances: float32 tensor [T, N], the terms of the smooth load (equation 10); `None` for the
            hard load.

    Returns:
        A `Routing`.
    """
    if mask is not None:
        gates = ops.where(mask[:, None], gates, 0.0)
    if chances is None:
        load = losses.hard_load(gates, expert_index, num_experts)
    else:
        counted = ops.isfinite(chances)
        if mask is not None:
            counted = ops.logical_and(counted, mask[:, None])
        load = ops.sum(ops.where(counted, chances, 0.0), axis=0)
    importance = losses.importance(gates, expert_index, num_experts)
    return Routing(ops.cast(expert_index, "int32"), gates, importance, load)


def check_routing(routing, num_experts):
    """Raises ValueError unless `routing` has the types and shapes of a `Routing` to N experts."""
    wanted = {
        "expert_index": ("int32", 2),
        "gates": ("float32", 2),
        "importance": ("float32", 1),
        "load": ("float32", 1),
    }
    if not isinstance(routing, Routing):
        raise ValueError(f"A gating layer must return a `Routing`. Received: {type(routing)}")
    for field, (dtype, rank) in wanted.items():
        value = getattr(routing, field)
        right = keras.backend.standardize_dtype(value.dtype) == dtype and len(value.shape) == rank
        # N is known when the graph is built; K may differ from batch to batch.
        last = routing.expert_index.shape[-1] if rank == 2 else num_experts
        if not right or value.shape[-1] != last:
            raise ValueError(
                f"`{field}` of a `Routing` to {num_experts} experts must be {dtype} of shape "
                f"{'[T, K]' if rank == 2 else [num_experts]}. "
                f"Received: {keras.backend.standardize_dtype(value.dtype)} of shape {value.shape}"
            )
