"""The oracle's gating: noisy top-k and softmax, and the z-loss of their logits."""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass
class Gating:
    """What a gating decides about a batch.

    `expert_index` [T, K] lists each row's experts by decreasing gate, -1 in places without one, as
    throughout a masked row; `gates` [T, N] is 0 for experts not chosen and in masked rows; `load`
    is [N]. `losses` are those that come of the gating alone, not weighted: "router_z", and
    "batchwise" where the gating is strictly balanced.

    The `backward(d_gates, d_load, d_losses)` of a gating takes a dict for the losses, too, and
    returns a dict of gradients.
    """

    expert_index: np.ndarray
    gates: np.ndarray
    load: np.ndarray
    losses: dict


def unmasked(mask, num_examples):
    """The rows that count."""
    return [t for t in range(num_examples) if mask is None or mask[t]]


def router_z(x, gate_kernel, rows):
    """Mean over `rows` of logsumexp(x·W_g)²: Eq 5 of Zoph et al. (2022, arXiv:2202.08906)."""
    count = max(len(rows), 1)  # of no rows the mean is 0
    log_sums = {t: np.logaddexp.reduce(x[t] @ gate_kernel) for t in rows}

    def backward(d_mean):
        d_x, d_gate_kernel = np.zeros_like(x), np.zeros_like(gate_kernel)
        for t in rows:
            softmax = np.exp(x[t] @ gate_kernel - log_sums[t])
            d_logits = d_mean / count * 2.0 * log_sums[t] * softmax
            d_x[t] = gate_kernel @ d_logits
            d_gate_kernel += np.outer(x[t], d_logits)
        return d_x, d_gate_kernel

    return sum(value**2 for value in log_sums.values()) / count, backward


def by_decreasing(h):
    """Indices of `h`, the largest element first; ties go to the lowest index."""
    return sorted(range(len(h)), key=lambda i: -h[i])  # a stable sort


def kth_excluding(h, k, i):
    """Index of the k-th largest element of `h` when element `i` is left out (Eq 8)."""
    return [j for j in by_decreasing(h) if j != i][k - 1]


def noisy_top_k_row(x, gate_kernel, noise_kernel, normals, k, noise_epsilon, smooth_load):
    """Noisy top-k gating of one example (Eq 3-5, 8-9): chosen experts, gates [N], load [N]."""
    num_experts = gate_kernel.shape[1]
    clean = x @ gate_kernel
    raw = x @ noise_kernel
    sigma = np.logaddexp(0.0, raw) + noise_epsilon  # softplus
    h = clean + normals * sigma

    chosen = by_decreasing(h)[:k]
    # A softmax over one chosen expert is constant. With k = 1 it is taken over all experts instead.
    competing = list(range(num_experts)) if k == 1 else chosen
    softmax = np.zeros(num_experts)
    softmax[competing] = np.exp(h[competing] - h.max())
    softmax /= softmax.sum()
    gates = np.zeros(num_experts)
    gates[chosen] = softmax[chosen]

    if smooth_load:
        threshold = [kth_excluding(h, k, i) for i in range(num_experts)]
        z = (clean - h[threshold]) / sigma
        load = np.array([0.5 * (1.0 + math.erf(value / math.sqrt(2.0))) for value in z])
    else:
        load = (gates > 0.0).astype(np.float64)

    def backward(d_gates, d_load):
        d_softmax = np.zeros(num_experts)
        d_softmax[chosen] = d_gates[chosen]
        d_h = softmax * (d_softmax - d_softmax @ softmax)
        d_clean = np.zeros(num_experts)
        d_sigma = np.zeros(num_experts)
        if smooth_load:
            d_z = d_load * np.exp(-0.5 * z**2) / math.sqrt(2.0 * math.pi)
            for i, j in enumerate(threshold):
                d_clean[i] += d_z[i] / sigma[i]
                d_h[j] -= d_z[i] / sigma[i]
                d_sigma[i] -= d_z[i] * z[i] / sigma[i]
        d_clean += d_h
        d_sigma += d_h * normals
        d_raw = d_sigma / (1.0 + np.exp(-raw))
        d_x = gate_kernel @ d_clean + noise_kernel @ d_raw
        return d_x, np.outer(x, d_clean), np.outer(x, d_raw)

    return chosen, gates, load, backward


def noisy_top_k(x, gate_kernel, noise_kernel, normals, k, mask, noise_epsilon):
    """Noisy top-k gating of a batch; the arguments are those of `reference.sparse_moe`.

    Returns a `Gating` and its `backward`.
    """
    num_examples, num_experts = len(x), gate_kernel.shape[1]
    # Without noise, or with nothing to choose, Eq 9 is no probability: count the rows instead.
    smooth_load = normals is not None and k < num_experts
    normals = np.zeros([num_examples, num_experts]) if normals is None else np.asarray(normals)
    rows = unmasked(mask, num_examples)
    z, z_backward = router_z(x, gate_kernel, rows)

    gating = Gating(
        expert_index=np.full([num_examples, k], -1),
        gates=np.zeros([num_examples, num_experts]),
        load=np.zeros(num_experts),
        losses={"router_z": z},
    )
    backward_of = {}
    for t in rows:
        gating.expert_index[t], gating.gates[t], load, backward_of[t] = noisy_top_k_row(
            x[t], gate_kernel, noise_kernel, normals[t], k, noise_epsilon, smooth_load
        )
        gating.load += load  # Eq 10

    def backward(d_gates, d_load, d_losses):
        d_x, d_gate_kernel = z_backward(d_losses["router_z"])
        d_noise_kernel = np.zeros_like(noise_kernel)
        for t in rows:
            d_x_row, d_gate_kernel_row, d_noise_kernel_row = backward_of[t](d_gates[t], d_load)
            d_x[t] += d_x_row
            d_gate_kernel += d_gate_kernel_row
            d_noise_kernel += d_noise_kernel_row
        return {"x": d_x, "gate_kernel": d_gate_kernel, "noise_kernel": d_noise_kernel}

    return gating, backward


def softmax_gating(x, gate_kernel, mask):
    """Softmax gating (Eq 2) of a batch: top-k gating that keeps every expert, without noise.

    As nothing is chosen, `expert_index` lists the experts in their own order, not by gate.
    """
    num_experts = gate_kernel.shape[1]
    gating, backward = noisy_top_k(
        x, gate_kernel, np.zeros_like(gate_kernel), None, num_experts, mask, 0.0
    )
    gating.expert_index[unmasked(mask, len(x))] = np.arange(num_experts)
    return gating, backward
