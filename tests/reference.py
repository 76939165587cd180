"""The sparsely-gated mixture-of-experts layer once more: the oracle of the tests.

Token by token and expert by expert in float64, NumPy alone, gradients by hand. Written from the
paper (Shazeer et al. 2017, arXiv:1701.06538, whose equation numbers it cites), not from the layer.

Every step returns its result and a function `backward`, which takes the gradients of the loss with
respect to that result and returns those with respect to the step's inputs. The steps are in files
of their own, reference_<subject>.py.

Axis letters: T examples, D width, N experts, K chosen experts, F hidden units, S shared experts.
"""

import dataclasses

import numpy as np
from reference_balanced import strictly_balanced
from reference_capacity import admit, capacity
from reference_experts import mixture
from reference_gating import noisy_top_k, softmax_gating, unmasked


@dataclasses.dataclass
class Reference:
    """Outputs, routing, losses and gradients of the layer.

    `gates` [T, K] goes with `expert_index` [T, K] (see `reference_gating.Gating`) and is 0 where
    that is -1; `dense_gates` is [T, N]. Gates, importance and load are those before any choice was
    dropped. The losses are weighted. `gradients` of sum(upstream * y) and all losses go by "x",
    "gate_kernel", "kernels" and "biases" (the last two are lists), and by "noise_kernel" (unless
    the gating is strictly balanced), "thresholds" (if it is), "shared_kernels" and "shared_biases"
    (lists again, if there are any).
    """

    y: np.ndarray
    expert_index: np.ndarray
    gates: np.ndarray
    dense_gates: np.ndarray
    importance: np.ndarray
    load: np.ndarray
    fraction_dropped: float
    importance_loss: float
    load_loss: float
    router_z_loss: float
    batchwise_loss: float
    gradients: dict

    @property
    def loss(self):
        """The sum of all losses."""
        return self.importance_loss + self.load_loss + self.router_z_loss + self.batchwise_loss


def float64(array):
    """`array` in double precision."""
    return np.asarray(array, np.float64)


def with_biases(kernels, biases):
    """Kernels and biases of a bank of experts in double precision, zeros where biases is None."""
    kernels = [float64(kernel) for kernel in kernels]
    if biases is None:
        biases = [np.zeros([kernel.shape[0], kernel.shape[2]]) for kernel in kernels]
    return kernels, [float64(bias) for bias in biases]


def cv_squared(values):
    """Squared coefficient of variation (Eq 7 and 11): population variance over squared mean."""
    mean, variance = values.mean(), values.var()
    denominator = mean**2 + 1e-10

    def backward(d_cv):
        d_variance = d_cv / denominator
        d_mean = -d_cv * variance * 2.0 * mean / denominator**2
        return (d_variance * 2.0 * (values - mean) + d_mean) / len(values)

    return variance / denominator, backward


def gated_layer(
    x,
    kernels,
    biases,
    routed,
    gating_backward,
    *,
    choices,
    mask,
    activation="relu",
    capacity_factor=None,
    shared_kernels=None,
    shared_biases=None,
    importance_loss_weight=0.1,
    load_loss_weight=0.1,
    router_z_loss_weight=0.0,
    batchwise_loss_weight=1.0,
    upstream=None,
):
    """What the layer does with a gating, whatever its kind: returns a `Reference`.

    Args:
        x: Examples, [T, D].
        kernels: The experts' kernels, [N, D, F], ..., [N, F, D_out].
        biases: The experts' biases, [N, F], ..., [N, D_out]; None for zeros.
        routed: A `reference_gating.Gating`, whose experts may have several axes.
        gating_backward: Its `backward`.
        choices: How many choices each example nominally has, for the capacity.
        mask: [T], False where an example counts for nothing; None for all True.
        activation: Of the hidden layers, of shared experts too: a key of
            `reference_experts.ACTIVATIONS`, or of `GATED_ACTIVATIONS`, for which F is twice as
            large in the kernel and bias of a hidden layer as in the kernel after it.
        capacity_factor: See `reference_capacity.capacity`; None for no limit.
        shared_kernels: Those of experts that see every example, [S, D, F], ..., [S, F, D_out];
            None for no such experts.
        shared_biases: Theirs, [S, F], ..., [S, D_out]; None for zeros.
        importance_loss_weight: w_importance of Eq 7.
        load_loss_weight: w_load of Eq 11.
        router_z_loss_weight: Of `reference_gating.router_z`.
        batchwise_loss_weight: Of L_batchwise, Eq 20; for strictly balanced gating alone.
        upstream: Gradient with respect to y, [T, D_out]; None for zeros.
    """
    kernels, biases = with_biases(kernels, biases)
    num_experts = routed.load.size
    gates = routed.gates.reshape([len(x), num_experts])

    rows_per_expert = capacity(capacity_factor, choices, len(x), num_experts)
    admitted, fraction_dropped = admit(routed.expert_index, gates, rows_per_expert)
    y, mixture_backward = mixture(x, gates * admitted, kernels, biases, activation)
    if shared_kernels is not None:
        shared_kernels, shared_biases = with_biases(shared_kernels, shared_biases)
        always = np.zeros([len(x), len(shared_kernels[0])])
        always[unmasked(mask, len(x))] = 1.0
        shared_y, shared_backward = mixture(x, always, shared_kernels, shared_biases, activation)
        y = y + shared_y

    importance = gates.sum(axis=0)  # Eq 6 and 13
    importance_cv, importance_backward = cv_squared(importance)
    load_cv, load_backward = cv_squared(routed.load.ravel())

    d_y = np.zeros_like(y) if upstream is None else float64(upstream)
    d_x, d_gates, d_kernels, d_biases = mixture_backward(d_y)
    d_gates += importance_backward(importance_loss_weight)  # each row's gates add to importance
    loss_weights = {"router_z": router_z_loss_weight, "batchwise": batchwise_loss_weight}
    gradients = gating_backward(
        d_gates.reshape(routed.gates.shape),
        load_backward(load_loss_weight).reshape(routed.load.shape),
        loss_weights,
    )
    gradients["x"] += d_x
    gradients["kernels"], gradients["biases"] = d_kernels, d_biases
    if shared_kernels is not None:
        d_x, _, gradients["shared_kernels"], gradients["shared_biases"] = shared_backward(d_y)
        gradients["x"] += d_x

    # The index -1 reads the last expert's gate, which is another's.
    gates_of_index = np.take_along_axis(gates, routed.expert_index, axis=1)
    return Reference(
        y=y,
        expert_index=routed.expert_index,
        gates=np.where(routed.expert_index < 0, 0.0, gates_of_index),
        dense_gates=routed.gates,
        importance=importance.reshape(routed.load.shape),
        load=routed.load,
        fraction_dropped=fraction_dropped,
        importance_loss=importance_loss_weight * importance_cv,
        load_loss=load_loss_weight * load_cv,
        router_z_loss=router_z_loss_weight * routed.losses["router_z"],
        batchwise_loss=batchwise_loss_weight * routed.losses.get("batchwise", 0.0),
        gradients=gradients,
    )


def sparse_moe(
    x,
    kernels,
    biases=None,
    *,
    gate_kernel,
    noise_kernel=None,
    normals=None,
    thresholds=None,
    k=None,
    gating="noisy_top_k",
    training=True,
    mask=None,
    noise_epsilon=1e-2,
    **options,
):
    """The whole layer, forward and backward: returns a `Reference`.

    Args:
        x: Examples, [T, D].
        kernels: The experts' kernels, [N, D, F], ..., [N, F, D_out].
        biases: The experts' biases, [N, F], ..., [N, D_out]; None for zeros.
        gate_kernel: W_g, [D, N].
        noise_kernel: W_noise, [D, N]; None for zeros.
        normals: The standard normals that were drawn, [T, N]; None for no noise.
        thresholds: T of Eq 19, [N]; None for zeros.
        k: How many experts each example gets.
        gating: "noisy_top_k"; or "softmax", which ignores `k`; or "strictly_balanced", which alone
            uses `thresholds` and `training`. The latter two ignore `noise_kernel` and `normals`.
        training: Whether the experts choose their examples, or the thresholds.
        mask: [T], False where an example counts for nothing; None for all True.
        noise_epsilon: Added to the softplus.
        **options: Those of `gated_layer` that follow `mask`.
    """
    x, gate_kernel = float64(x), float64(gate_kernel)
    noise_kernel = np.zeros_like(gate_kernel) if noise_kernel is None else float64(noise_kernel)
    num_experts = gate_kernel.shape[1]
    thresholds = np.zeros(num_experts) if thresholds is None else float64(thresholds)

    if gating == "softmax":
        k = num_experts
        routing = softmax_gating(x, gate_kernel, mask)
    elif gating == "noisy_top_k":
        routing = noisy_top_k(x, gate_kernel, noise_kernel, normals, k, mask, noise_epsilon)
    elif gating == "strictly_balanced":
        routing = strictly_balanced(x, gate_kernel, thresholds, k, mask, training)
    else:
        raise ValueError(
            '`gating` must be "noisy_top_k", "softmax" or "strictly_balanced". '
            f"Received: {gating!r}"
        )
    return gated_layer(x, kernels, biases, *routing, choices=k, mask=mask, **options)
