"""Equation 1 for a batch: its rows go to their experts, and the weighted outputs come back.

Where the experts are decides how: all of them here, divided among the replicas of a strategy, or,
for a single example outside training, addressed without sorting anything.
"""

import keras
from keras import ops

from keras_moe import dispatch
from keras_moe.backend import collectives, recomputation
from keras_moe.backend.given import Given
from keras_moe.distribute.exchange import on_their_replicas
from keras_moe.distribute.global_capacity import drop_beyond
from keras_moe.experts.feed_forward import takes_one_example

_MOST_UNROLLED = 64  # K up to which an example's experts have operations of their own in the graph


def mix(bank, examples, routing, *, training, capacity=None, expert_parallel=False):
    """Computes y = Σ_i G(x)_i · E_i(x) for each example.

    Args:
        bank: The N experts.
        examples: Float tensor [T, D].
        routing: Their `Routing`.
        training: Whether gradients will be taken.
        capacity: Function from the number of examples to the most rows of an expert. What is beyond
            is dropped. Default: nothing is.
        expert_parallel: Whether each replica holds its experts alone.

    Returns:
        y, float [T, D_out], and the part of the choices that was dropped, `None` without capacity.
    """
    if expert_parallel and collectives.num_replicas() > 1:
        return _over_replicas(bank, examples, routing, capacity)
    if training or not _takes_one(bank, routing):
        return _here(bank, examples, routing, capacity)
    return _of_one_or_more(bank, examples, routing), None


def _here(bank, examples, routing, capacity=None):
    places = None if capacity is None else capacity(ops.shape(examples)[0])
    plan = dispatch.make_plan(routing, bank.num_experts, places)
    rows = _compute(bank, dispatch.dispatch(examples, plan), plan)
    return dispatch.combine(rows, routing.gates, plan), plan.fraction_dropped


def _over_replicas(bank, examples, routing, capacity):
    """The same of the batch of all replicas: each one's rows go where their experts are."""
    collectives.check_can_communicate()
    num_local = bank.num_experts // collectives.num_replicas()
    places, most = None, None
    if capacity is not None:
        places = capacity(collectives.total_size(ops.shape(examples)[0]))
        most = num_local * places

    def on_replica(batch):
        examples, chosen = batch
        fraction_dropped = None
        if places is not None:
            chosen, fraction_dropped = drop_beyond(places, chosen, bank.num_experts)
        plan = dispatch.make_plan(chosen, bank.num_experts)
        rows = on_their_replicas(
            lambda rows, plan: _compute(bank, rows, plan),
            dispatch.dispatch(examples, plan),
            plan.rows_per_expert,
            lambda received: dispatch.make_plan(received, num_local, places),
            most,
        )
        return dispatch.combine(rows, chosen.gates, plan), fraction_dropped

    chosen = dispatch.Choices(routing.expert_index, routing.gates)
    return collectives.on_replicas(on_replica, (examples, chosen), bank.weights)


def _takes_one(bank, routing):
    k = routing.expert_index.shape[1]
    return k is not None and k <= _MOST_UNROLLED and takes_one_example(bank)


def _of_one_or_more(bank, examples, routing):
    """The same, a single example by another way: which it is may be known to the graph alone."""
    number = ops.shape(examples)[0]
    if isinstance(number, int):
        way = _of_one if number == 1 else _of_more
        return way(bank, examples, routing)

    # In an export gradients written by hand survive, but not within a branch. So this one is around
    # both branches, and what a gradient is needed of has to be an argument.
    variables = [v for v in bank.variables if keras.backend.is_float_dtype(v.dtype)]

    def decide(examples, gates, *values):
        def along(way):
            with Given(variables, values):
                return way(bank, examples, routing._replace(gates=gates))

        return ops.cond(number == 1, lambda: along(_of_one), lambda: along(_of_more))

    return recomputation.recomputed(decide)(examples, routing.gates, *(v.value for v in variables))


def _of_more(bank, examples, routing):
    return _here(bank, examples, routing)[0]


def _of_one(bank, examples, routing):
    """The same of a single example, without any plan."""
    experts, gates = dispatch.of_one_example(routing)
    rows = bank(examples[:1], experts=experts)
    rows = ops.where(gates[:, None] > 0, rows, ops.zeros((), rows.dtype))
    return dispatch.as_batch(ops.matmul(ops.cast(gates[None], rows.dtype), rows))


def _compute(bank, rows, plan):
    if plan.rows_per_expert is None:
        return bank(rows)
    return bank(rows, plan.rows_per_expert)
