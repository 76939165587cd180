"""The sparsely-gated mixture-of-experts layer once more: the oracle of the tests.

Token by token and expert by expert in float64, NumPy alone, gradients by hand. Written from the
paper (Shazeer et al. 2017, arXiv:1701.06538, whose equation numbers it cites), not from the layer.

Every step returns its result and a function `backward`, which takes the gradients of the loss with
respect to that result and returns those with respect to the step's inputs.

Axis letters: T examples, D width, N experts, K chosen experts, F hidden units.
"""

import dataclasses
import math

import numpy as np

# Name: (function, derivative), both of the pre-activation.
ACTIVATIONS = {
    "relu": (lambda z: np.maximum(z, 0.0), lambda z: (z > 0.0).astype(np.float64)),
    "tanh": (np.tanh, lambda z: 1.0 - np.tanh(z) ** 2),
}


@dataclasses.dataclass
class Gating:
    """What a gating decides about a batch.

    `expert_index` [T, K] lists each row's experts by decreasing logit, -1 throughout a masked row;
    `gates` [T, N] is 0 for experts not chosen and in masked rows; `load` is [N].
    """

    expert_index: np.ndarray
    gates: np.ndarray
    load: np.ndarray


@dataclasses.dataclass
class Reference:
    """Outputs, routing, losses and gradients of the layer.

    `gates` [T, K] goes with `expert_index` [T, K] (see `Gating`); `dense_gates` is [T, N].
    The losses are weighted. `gradients` of sum(upstream * y) + importance_loss + load_loss go by
    "x", "gate_kernel", "noise_kernel", "kernels" and "biases" (the last two are lists).
    """

    y: np.ndarray
    expert_index: np.ndarray
    gates: np.ndarray
    dense_gates: np.ndarray
    importance: np.ndarray
    load: np.ndarray
    importance_loss: float
    load_loss: float
    gradients: dict


def float64(array):
    """`array` in double precision."""
    return np.asarray(array, np.float64)


def cv_squared(values):
    """Squared coefficient of variation (Eq 7 and 11): population variance over squared mean."""
    mean, variance = values.mean(), values.var()
    denominator = mean**2 + 1e-10

    def backward(d_cv):
        d_variance = d_cv / denominator
        d_mean = -d_cv * variance * 2.0 * mean / denominator**2
        return (d_variance * 2.0 * (values - mean) + d_mean) / len(values)

    return variance / denominator, backward


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
    """Noisy top-k gating of a batch; the arguments are those of `sparse_moe`.

    Returns a `Gating` and its `backward(d_gates, d_load)`, which returns a dict of gradients.
    """
    num_examples, num_experts = len(x), gate_kernel.shape[1]
    # Without noise, or with nothing to choose, Eq 9 is no probability: count the rows instead.
    smooth_load = normals is not None and k < num_experts
    normals = np.zeros([num_examples, num_experts]) if normals is None else float64(normals)
    rows = [t for t in range(num_examples) if mask is None or mask[t]]

    gating = Gating(
        expert_index=np.full([num_examples, k], -1),
        gates=np.zeros([num_examples, num_experts]),
        load=np.zeros(num_experts),
    )
    backward_of = {}
    for t in rows:
        gating.expert_index[t], gating.gates[t], load, backward_of[t] = noisy_top_k_row(
            x[t], gate_kernel, noise_kernel, normals[t], k, noise_epsilon, smooth_load
        )
        gating.load += load  # Eq 10

    def backward(d_gates, d_load):
        gradients = {
            "x": np.zeros_like(x),
            "gate_kernel": np.zeros_like(gate_kernel),
            "noise_kernel": np.zeros_like(noise_kernel),
        }
        for t in rows:
            d_x, d_gate_kernel, d_noise_kernel = backward_of[t](d_gates[t], d_load)
            gradients["x"][t] = d_x
            gradients["gate_kernel"] += d_gate_kernel
            gradients["noise_kernel"] += d_noise_kernel
        return gradients

    return gating, backward


def softmax_gating(x, gate_kernel, mask):
    """Softmax gating (Eq 2) of a batch: top-k gating that keeps every expert, without noise."""
    num_experts = gate_kernel.shape[1]
    return noisy_top_k(x, gate_kernel, np.zeros_like(gate_kernel), None, num_experts, mask, 0.0)


def feed_forward(x, kernels, biases, activation):
    """One expert on one example [D]: `activation` after every layer but the last."""
    function, derivative = ACTIVATIONS[activation]
    last = len(kernels) - 1
    inputs, pre_activations = [], []
    hidden = x
    for layer, (kernel, bias) in enumerate(zip(kernels, biases, strict=True)):
        inputs.append(hidden)
        pre_activations.append(hidden @ kernel + bias)
        hidden = pre_activations[-1] if layer == last else function(pre_activations[-1])

    def backward(d_hidden):
        d_kernels, d_biases = [], []
        for layer in range(last, -1, -1):
            d_pre = d_hidden if layer == last else d_hidden * derivative(pre_activations[layer])
            d_kernels.insert(0, np.outer(inputs[layer], d_pre))
            d_biases.insert(0, d_pre)
            d_hidden = kernels[layer] @ d_pre
        return d_hidden, d_kernels, d_biases

    return hidden, backward


def mixture(x, gates, kernels, biases, activation):
    """The output (Eq 1): an expert whose gate is 0 is never computed."""
    y = np.zeros([len(x), kernels[-1].shape[-1]])
    computed = {}
    for t in range(len(x)):
        for i in np.flatnonzero(gates[t]):
            output, backward_one = feed_forward(
                x[t], [kernel[i] for kernel in kernels], [bias[i] for bias in biases], activation
            )
            y[t] += gates[t, i] * output
            computed[t, i] = output, backward_one

    def backward(d_y):
        d_x, d_gates = np.zeros_like(x), np.zeros_like(gates)
        d_kernels = [np.zeros_like(kernel) for kernel in kernels]
        d_biases = [np.zeros_like(bias) for bias in biases]
        for (t, i), (output, backward_one) in computed.items():
            d_gates[t, i] = d_y[t] @ output
            d_x_one, d_kernels_one, d_biases_one = backward_one(gates[t, i] * d_y[t])
            d_x[t] += d_x_one
            for layer in range(len(kernels)):
                d_kernels[layer][i] += d_kernels_one[layer]
                d_biases[layer][i] += d_biases_one[layer]
        return d_x, d_gates, d_kernels, d_biases

    return y, backward


def sparse_moe(
    x,
    kernels,
    biases=None,
    *,
    gate_kernel,
    noise_kernel=None,
    normals=None,
    k=None,
    gating="noisy_top_k",
    mask=None,
    activation="relu",
    importance_loss_weight=0.1,
    load_loss_weight=0.1,
    noise_epsilon=1e-2,
    upstream=None,
):
    """The whole layer, forward and backward: returns a `Reference`.

    Args:
        x: Examples, [T, D].
        kernels: The experts' kernels, [N, D, F], ..., [N, F, D_out].
        biases: The experts' biases, [N, F], ..., [N, D_out]; None for zeros.
        gate_kernel: W_g, [D, N].
        noise_kernel: W_noise, [D, N]; None for zeros.
        normals: The standard normals that were drawn, [T, N]; None for no noise.
        k: How many experts each example gets.
        gating: "noisy_top_k", or "softmax", which ignores `noise_kernel`, `normals` and `k`.
        mask: [T], False where an example counts for nothing; None for all True.
        activation: Of the hidden layers, a key of `ACTIVATIONS`.
        importance_loss_weight: w_importance of Eq 7.
        load_loss_weight: w_load of Eq 11.
        noise_epsilon: Added to the softplus.
        upstream: Gradient with respect to y, [T, D_out]; None for zeros.
    """
    x, gate_kernel = float64(x), float64(gate_kernel)
    noise_kernel = np.zeros_like(gate_kernel) if noise_kernel is None else float64(noise_kernel)
    kernels = [float64(kernel) for kernel in kernels]
    if biases is None:
        biases = [np.zeros([kernel.shape[0], kernel.shape[2]]) for kernel in kernels]
    biases = [float64(bias) for bias in biases]

    if gating == "softmax":
        routed, gating_backward = softmax_gating(x, gate_kernel, mask)
    elif gating == "noisy_top_k":
        routed, gating_backward = noisy_top_k(
            x, gate_kernel, noise_kernel, normals, k, mask, noise_epsilon
        )
    else:
        raise ValueError(f'`gating` must be "noisy_top_k" or "softmax". Received: {gating!r}')
    y, mixture_backward = mixture(x, routed.gates, kernels, biases, activation)
    importance = routed.gates.sum(axis=0)  # Eq 6
    importance_cv, importance_backward = cv_squared(importance)
    load_cv, load_backward = cv_squared(routed.load)

    d_y = np.zeros_like(y) if upstream is None else float64(upstream)
    d_x, d_gates, d_kernels, d_biases = mixture_backward(d_y)
    d_gates += importance_backward(importance_loss_weight)  # each row's gates add to importance
    gradients = gating_backward(d_gates, load_backward(load_loss_weight))
    gradients["x"] += d_x
    gradients["kernels"], gradients["biases"] = d_kernels, d_biases

    return Reference(
        y=y,
        expert_index=routed.expert_index,
        # The index -1 of a masked row reads the last expert's gate: 0, like all gates of that row.
        gates=np.take_along_axis(routed.gates, routed.expert_index, axis=1),
        dense_gates=routed.gates,
        importance=importance,
        load=routed.load,
        importance_loss=importance_loss_weight * importance_cv,
        load_loss=load_loss_weight * load_cv,
        gradients=gradients,
    )
