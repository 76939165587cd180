"""The hierarchical mixture of experts once more (appendix B): the oracle of its tests.

As in reference.py, whose pieces it is put together from: float64, token by token, gradients by
hand, written from the paper and not from the layer.

Axis letters: T examples, D width, A groups, B experts in each, K = k1·k2 chosen experts.
"""

import numpy as np
from reference import float64, gated_layer
from reference_balanced import strictly_balanced
from reference_gating import Gating, noisy_top_k


def hierarchical_gating(x, kernels, noise_kernels, normals, k, mask, noise_epsilon):
    """Gating at both levels of a batch; the arguments are those of `hierarchical_moe`.

    Returns a `Gating` with gates [T, A, B] and load [A, B], and its `backward`.
    """
    (primary, secondary), (primary_noise, secondary_noise) = kernels, noise_kernels
    primary_normals, secondary_normals = (None, None) if normals is None else normals
    num_groups, _, group_size = secondary.shape

    top, top_backward = noisy_top_k(
        x, primary, primary_noise, primary_normals, k[0], mask, noise_epsilon
    )
    chooses = top.gates > 0.0
    received = chooses.sum(axis=0)  # |X^(i)|, with X^(i) = the examples that choose group i

    gates, load = np.zeros([len(x), num_groups, group_size]), np.zeros([num_groups, group_size])
    groups, group_backwards = [], []
    for i in range(num_groups):
        normals_i = None
        if normals is not None:
            normals_i = np.zeros([len(x), group_size])
            for t in np.flatnonzero(chooses[:, i]):
                normals_i[t] = secondary_normals[t][list(top.expert_index[t]).index(i)]
        group, group_backward = noisy_top_k(
            x, secondary[i], secondary_noise[i], normals_i, k[1], chooses[:, i], noise_epsilon
        )
        gates[:, i] = top.gates[:, i, None] * group.gates  # Eq 12
        if received[i]:
            load[i] = top.load[i] * group.load / received[i]  # Eq 14
        groups.append(group)
        group_backwards.append(group_backward)

    # The mean over all pairs of an example and its group, of the means over each group's examples.
    shares = received / max(received.sum(), 1)
    z = top.losses["router_z"] + sum(
        share * group.losses["router_z"] for share, group in zip(shares, groups, strict=True)
    )

    expert_index = np.full([len(x), k[0] * k[1]], -1)
    for t in range(len(x)):
        if mask is None or mask[t]:
            expert_index[t] = [
                i * group_size + j for i in top.expert_index[t] for j in groups[i].expert_index[t]
            ]

    def backward(d_gates, d_load, d_losses):
        d_top_gates, d_top_load = np.zeros_like(top.gates), np.zeros_like(top.load)
        d_secondary, d_secondary_noise = np.zeros_like(secondary), np.zeros_like(secondary)
        d_x = np.zeros_like(x)
        for i in np.flatnonzero(received):
            d_top_gates[:, i] = (d_gates[:, i] * groups[i].gates).sum(axis=1)
            d_top_load[i] = d_load[i] @ groups[i].load / received[i]
            d_group = group_backwards[i](
                d_gates[:, i] * top.gates[:, i, None],
                d_load[i] * top.load[i] / received[i],
                {"router_z": d_losses["router_z"] * shares[i]},
            )
            d_x += d_group["x"]
            d_secondary[i] = d_group["gate_kernel"]
            d_secondary_noise[i] = d_group["noise_kernel"]
        d_top = top_backward(d_top_gates, d_top_load, d_losses)
        return {
            "x": d_x + d_top["x"],
            "primary": d_top["gate_kernel"],
            "primary_noise": d_top["noise_kernel"],
            "secondary": d_secondary,
            "secondary_noise": d_secondary_noise,
        }

    return Gating(expert_index, gates, load, {"router_z": z}), backward


def hierarchical_balanced_gating(x, kernels, thresholds, k, mask, training):
    """Strictly balanced gating at both levels, of a batch; as `hierarchical_gating`."""
    (primary, secondary), (primary_thresholds, secondary_thresholds) = kernels, thresholds
    num_groups, _, group_size = secondary.shape
    top, top_backward = strictly_balanced(x, primary, primary_thresholds, k[0], mask, training)
    chooses = top.gates > 0.0
    groups, group_backwards = zip(
        *(
            strictly_balanced(
                x, secondary[i], secondary_thresholds[i], k[1], chooses[:, i], training
            )
            for i in range(num_groups)
        ),
        strict=True,
    )
    gates = np.stack([top.gates[:, i, None] * groups[i].gates for i in range(num_groups)], axis=1)
    load = np.stack([group.load for group in groups])
    received = chooses.sum(axis=0)
    shares = received / max(received.sum(), 1)
    summed = {
        "router_z": top.losses["router_z"]
        + sum(share * g.losses["router_z"] for share, g in zip(shares, groups, strict=True)),
        "batchwise": top.losses["batchwise"] + sum(g.losses["batchwise"] for g in groups),
    }

    # As many places in each of an example's groups as the fullest pair of them needs.
    most = max(group.expert_index.shape[1] for group in groups)
    expert_index = np.full([len(x), top.expert_index.shape[1], most], -1)
    for t, slot in np.argwhere(top.expert_index >= 0):
        i = top.expert_index[t, slot]
        members = groups[i].expert_index[t]
        members = members[members >= 0]
        expert_index[t, slot, : len(members)] = i * group_size + members
    expert_index = expert_index.reshape([len(x), -1])

    def backward(d_gates, d_load, d_losses):
        d_top_gates, d_x = np.zeros_like(top.gates), np.zeros_like(x)
        d_secondary = np.zeros_like(secondary)
        d_secondary_thresholds = np.zeros_like(secondary_thresholds)
        for i in range(num_groups):
            d_top_gates[:, i] = (d_gates[:, i] * groups[i].gates).sum(axis=1)
            of_group = {**d_losses, "router_z": d_losses["router_z"] * shares[i]}
            d_group = group_backwards[i](d_gates[:, i] * top.gates[:, i, None], None, of_group)
            d_x += d_group["x"]
            d_secondary[i] = d_group["gate_kernel"]
            d_secondary_thresholds[i] = d_group["thresholds"]
        d_top = top_backward(d_top_gates, None, d_losses)
        return {
            "x": d_x + d_top["x"],
            "primary": d_top["gate_kernel"],
            "primary_thresholds": d_top["thresholds"],
            "secondary": d_secondary,
            "secondary_thresholds": d_secondary_thresholds,
        }

    return Gating(expert_index, gates, load, summed), backward


def hierarchical_moe(
    x,
    kernels,
    biases=None,
    *,
    primary,
    secondary,
    primary_noise=None,
    secondary_noise=None,
    primary_thresholds=None,
    secondary_thresholds=None,
    balanced_in_training=None,
    normals=None,
    k,
    mask=None,
    noise_epsilon=1e-2,
    **options,
):
    """The whole layer, forward and backward: returns a `reference.Reference`.

    Its importance, load and dense gates have the axes [A, B], and its gradients the names of the
    arguments.

    Args:
        x: Examples, [T, D].
        kernels: The experts' kernels, group by group: [A·B, D, F], ..., [A·B, F, D_out].
        biases: The experts' biases, [A·B, F], ..., [A·B, D_out]; None for zeros.
        primary: W_g of the groups, [D, A].
        secondary: W_g of each group's experts, [A, D, B].
        primary_noise: W_noise of the groups, [D, A]; None for zeros.
        secondary_noise: W_noise of each group's experts, [A, D, B]; None for zeros.
        primary_thresholds: T of the groups, [A], for strictly balanced gating alone.
        secondary_thresholds: T of each group's experts, [A, B], likewise.
        balanced_in_training: For strictly balanced gating, whether the experts choose their
            examples (True), or the thresholds (False); None for noisy top-k gating.
        normals: The standard normals that were drawn, a pair: [T, A], and [T, k1, B] for the
            groups that each example chose, in decreasing order of their logits. None for no noise.
        k: How many groups each example gets, and how many experts in each: a pair.
        mask: [T], False where an example counts for nothing; None for all True.
        noise_epsilon: Added to the softplus.
        **options: Those of `reference.gated_layer` that follow `mask`.
    """
    x, primary, secondary = float64(x), float64(primary), float64(secondary)
    noise_kernels = [
        np.zeros_like(kernel) if noise is None else float64(noise)
        for kernel, noise in ((primary, primary_noise), (secondary, secondary_noise))
    ]
    kernel_pair = (primary, secondary)
    if balanced_in_training is None:
        routing = hierarchical_gating(
            x, kernel_pair, noise_kernels, normals, k, mask, noise_epsilon
        )
    else:
        thresholds = float64(primary_thresholds), float64(secondary_thresholds)
        routing = hierarchical_balanced_gating(
            x, kernel_pair, thresholds, k, mask, balanced_in_training
        )
    return gated_layer(x, kernels, biases, *routing, choices=k[0] * k[1], mask=mask, **options)
