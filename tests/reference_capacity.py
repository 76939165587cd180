"""The oracle's capacity: how many rows an expert takes, and which."""

import math

import numpy as np


def capacity(factor, choices, num_examples, num_experts):
    """C = min(T, ceil(factor·K·T / N)) rows for each expert; T, hence no limit, without a factor.

    `num_examples` T counts masked rows too; `choices` K is the nominal number of each example's.
    """
    if factor is None:
        return num_examples
    return min(num_examples, math.ceil(factor * choices * num_examples / num_experts))


def admit(expert_index, gates, rows_per_expert):
    """First come, first served: all rows' first choices in row order, then all second choices, ...

    Args:
        expert_index: [T, K], each row's choices in order; -1 where it has none.
        gates: [T, N]; a choice whose gate is 0 takes no place.
        rows_per_expert: C.

    Returns:
        Which gates found a place, [T, N] of bool; the fraction of the positive gates that did not.
    """
    admitted, taken = np.zeros(gates.shape, bool), np.zeros(gates.shape[1], int)
    for place in range(expert_index.shape[1]):
        for t in range(len(gates)):
            i = expert_index[t, place]
            if i >= 0 and gates[t, i] > 0.0 and taken[i] < rows_per_expert:
                admitted[t, i] = True
                taken[i] += 1
    choices = int((gates > 0.0).sum())
    return admitted, (choices - taken.sum()) / max(choices, 1)
