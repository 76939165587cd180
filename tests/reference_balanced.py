"""The oracle's strictly balanced gating (appendix F): experts choose among the examples."""

import math

import numpy as np
from reference_gating import Gating, by_decreasing, router_z, unmasked


def softmax(logits):
    """G_σ (Eq 2) of one example."""
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def batchwise_mask(scores, k, rows):
    """M_batchwise (Eq 18): each expert keeps the m = ceil(k·|X| / N) rows that it scores highest.

    Of equal scores the lower row's is kept. `k` need not be an integer.
    """
    mask = np.zeros(scores.shape, bool)
    m = math.ceil(k * len(rows) / scores.shape[1])
    for i in range(scores.shape[1]):
        for t in sorted(rows, key=lambda t: -scores[t, i])[:m]:  # a stable sort
            mask[t, i] = True
    return mask


def threshold_mask(scores, thresholds, rows):
    """M_threshold (Eq 19): each row gets the experts whose score is above their threshold."""
    mask = np.zeros(scores.shape, bool)
    for t in rows:
        mask[t] = scores[t] > thresholds
    return mask


def strictly_balanced(x, gate_kernel, thresholds, k, mask, training):
    """Strictly balanced gating of a batch; the arguments are those of `reference.sparse_moe`.

    Returns a `Gating` and its `backward`. `expert_index` has as many places as the example with the
    most experts needs, at least 1; the rest of a row that needs fewer is -1.
    """
    rows = unmasked(mask, len(x))
    z, z_backward = router_z(x, gate_kernel, rows)
    scores = np.zeros([len(x), gate_kernel.shape[1]])
    for t in rows:
        scores[t] = softmax(x[t] @ gate_kernel)
    kept = batchwise_mask(scores, k, rows)
    above = threshold_mask(scores, thresholds, rows)
    chosen = kept if training else above

    gates, totals = np.zeros_like(scores), (scores * chosen).sum(axis=1)
    expert_index = np.full([len(x), chosen.sum(axis=1).max(initial=1)], -1)
    for t in np.flatnonzero(totals):
        gates[t] = scores[t] * chosen[t] / totals[t]  # Eq 16
        experts = [i for i in by_decreasing(gates[t]) if chosen[t, i]]
        expert_index[t, : len(experts)] = experts

    # Eq 20, of which the masks are constants. Without the mask of the batch there is no loss.
    difference = above.astype(np.float64) - kept if training else np.zeros_like(scores)
    batchwise = (difference * (scores - thresholds)).sum()

    def backward(d_gates, d_load, d_losses):
        del d_load  # a count of rows has no gradient
        d_x, d_gate_kernel = z_backward(d_losses["router_z"])
        d_scores = d_losses["batchwise"] * difference
        for t in rows:
            if totals[t]:
                d_scores[t] += chosen[t] * (d_gates[t] - d_gates[t] @ gates[t]) / totals[t]
            d_logits = scores[t] * (d_scores[t] - d_scores[t] @ scores[t])
            d_x[t] += gate_kernel @ d_logits
            d_gate_kernel += np.outer(x[t], d_logits)
        d_thresholds = -d_losses["batchwise"] * difference.sum(axis=0)
        return {"x": d_x, "gate_kernel": d_gate_kernel, "thresholds": d_thresholds}

    load = chosen.sum(axis=0).astype(np.float64)
    return Gating(expert_index, gates, load, {"router_z": z, "batchwise": batchwise}), backward
