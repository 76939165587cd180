"""The hierarchical mixture of experts once more (appendix B): the oracle of its tests.

As in reference.py, whose pieces it is put together from: float64, token by token, gradients by
hand, written from the paper and not from the layer.

Axis letters: T examples, D width, A groups, B experts in each, K = k1·k2 chosen experts.
"""

import numpy as np
import reference
from reference import float64


def hierarchical_gating(x, kernels, noise_kernels, normals, k, mask, noise_epsilon):
    """Gating at both levels of a batch; the arguments are those of `hierarchical_moe`.

    Returns a `reference.Gating` with gates [T, A, B] and load [A, B], and its
    `backward(d_gates, d_load)`, which returns a dict of gradients.
    """
    (primary, secondary), (primary_noise, secondary_noise) = kernels, noise_kernels
    primary_normals, secondary_normals = (None, None) if normals is None else normals
    num_groups, _, group_size = secondary.shape

    top, top_backward = reference.noisy_top_k(
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
        group, group_backward = reference.noisy_top_k(
            x, secondary[i], secondary_noise[i], normals_i, k[1], chooses[:, i], noise_epsilon
        )
        gates[:, i] = top.gates[:, i, None] * group.gates  # Eq 12
        if received[i]:
            load[i] = top.load[i] * group.load / received[i]  # Eq 14
        groups.append(group)
        group_backwards.append(group_backward)

    expert_index = np.full([len(x), k[0] * k[1]], -1)
    for t in range(len(x)):
        if mask is None or mask[t]:
            expert_index[t] = [
                i * group_size + j for i in top.expert_index[t] for j in groups[i].expert_index[t]
            ]

    def backward(d_gates, d_load):
        d_top_gates, d_top_load = np.zeros_like(top.gates), np.zeros_like(top.load)
        d_secondary, d_secondary_noise = np.zeros_like(secondary), np.zeros_like(secondary)
        d_x = np.zeros_like(x)
        for i in np.flatnonzero(received):
            d_top_gates[:, i] = (d_gates[:, i] * groups[i].gates).sum(axis=1)
            d_top_load[i] = d_load[i] @ groups[i].load / received[i]
            d_group = group_backwards[i](
                d_gates[:, i] * top.gates[:, i, None], d_load[i] * top.load[i] / received[i]
            )
            d_x += d_group["x"]
            d_secondary[i] = d_group["gate_kernel"]
            d_secondary_noise[i] = d_group["noise_kernel"]
        d_top = top_backward(d_top_gates, d_top_load)
        return {
            "x": d_x + d_top["x"],
            "primary": d_top["gate_kernel"],
            "primary_noise": d_top["noise_kernel"],
            "secondary": d_secondary,
            "secondary_noise": d_secondary_noise,
        }

    return reference.Gating(expert_index, gates, load), backward


def hierarchical_moe(
    x,
    kernels,
    biases=None,
    *,
    primary,
    secondary,
    primary_noise=None,
    secondary_noise=None,
    normals=None,
    k,
    mask=None,
    activation="relu",
    importance_loss_weight=0.1,
    load_loss_weight=0.1,
    noise_epsilon=1e-2,
    upstream=None,
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
        normals: The standard normals that were drawn, a pair: [T, A], and [T, k1, B] for the
            groups that each example chose, in decreasing order of their logits. None for no noise.
        k: How many groups each example gets, and how many experts in each: a pair.
        mask: As in `reference.sparse_moe`, like all that follows.
        activation: Of the hidden layers.
        importance_loss_weight: w_importance of Eq 7.
        load_loss_weight: w_load of Eq 11.
        noise_epsilon: Added to the softplus.
        upstream: Gradient with respect to y, [T, D_out]; None for zeros.
    """
    x, primary, secondary = float64(x), float64(primary), float64(secondary)
    noise_kernels = [
        np.zeros_like(kernel) if noise is None else float64(noise)
        for kernel, noise in ((primary, primary_noise), (secondary, secondary_noise))
    ]
    kernels = [float64(kernel) for kernel in kernels]
    if biases is None:
        biases = [np.zeros([kernel.shape[0], kernel.shape[2]]) for kernel in kernels]
    biases = [float64(bias) for bias in biases]

    routed, gating_backward = hierarchical_gating(
        x, (primary, secondary), noise_kernels, normals, k, mask, noise_epsilon
    )
    num_experts = routed.load.size
    gates = routed.gates.reshape([len(x), num_experts])
    y, mixture_backward = reference.mixture(x, gates, kernels, biases, activation)
    importance = routed.gates.sum(axis=0)  # Eq 13
    importance_cv, importance_backward = reference.cv_squared(importance.ravel())
    load_cv, load_backward = reference.cv_squared(routed.load.ravel())

    d_y = np.zeros_like(y) if upstream is None else float64(upstream)
    d_x, d_gates, d_kernels, d_biases = mixture_backward(d_y)
    d_gates += importance_backward(importance_loss_weight)
    gradients = gating_backward(
        d_gates.reshape(routed.gates.shape),
        load_backward(load_loss_weight).reshape(routed.load.shape),
    )
    gradients["x"] += d_x
    gradients["kernels"], gradients["biases"] = d_kernels, d_biases

    return reference.Reference(
        y=y,
        expert_index=routed.expert_index,
        gates=np.take_along_axis(gates, routed.expert_index, axis=1),
        dense_gates=routed.gates,
        importance=importance,
        load=routed.load,
        importance_loss=importance_loss_weight * importance_cv,
        load_loss=load_loss_weight * load_cv,
        gradients=gradients,
    )
