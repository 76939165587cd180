"""The gating layers: which experts an example goes to, and with which weights.

A gating layer is called with the examples `x` [T, D], `training` and `mask` [T], and returns a
`Routing`. T examples, D width, N experts, K experts chosen per example. Gating computes in float32
under every dtype policy: in lower precision an example would pick other experts.
"""

from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_moe import losses
from keras_moe.arguments import check_k, check_positive, check_size, check_weight
from keras_moe.contract.inputs import as_input, as_mask
from keras_moe.contract.own_losses import OwnLosses
from keras_moe.dispatch import exact
from keras_moe.dispatch.choices import top_k
from keras_moe.distribute.noise import ReplicaSeedGenerator
from keras_moe.saving import CheckedVariables

# Stands for NaN among the logits: finite, since `tf.debugging.enable_check_numerics` stops at the
# first infinity, be it where nothing is wrong.
LOWEST = float(np.finfo("float32").min)


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


class Gating(OwnLosses, CheckedVariables, keras.layers.Layer):
    """What all gating layers share: the number of experts, float32, and the router z-loss."""

    def __init__(self, num_experts, router_z_loss_weight=0.0, **kwargs):
        super().__init__(**{"dtype": "float32", **kwargs})
        if self.dtype_policy.name != "float32":
            raise ValueError(
                "Gating computes in float32 whatever the dtype of the model; leave `dtype` out. "
                f"Received: dtype={self.dtype_policy.name!r}"
            )
        self.num_experts = check_size("num_experts", num_experts)
        self.router_z_loss_weight = check_weight("router_z_loss_weight", router_z_loss_weight)
        self.input_spec = keras.InputSpec(ndim=2)
        self.supports_masking = True

    def build(self, input_shape):
        self.input_spec = keras.InputSpec(ndim=2, axes={-1: input_shape[-1]})

    def examples(self, x, mask):
        """Returns what a call is given as float32 [T, D] and, unless `None`, bool [T]."""
        x = as_input(self, x)
        return x, as_mask(mask, x)

    def rematerialized_call(self, layer_call, *args, **kwargs):
        """Under `keras.RematScope` nothing is computed again: it would draw other noise."""
        return layer_call

    def add_kernel(self, name, *shape):
        """Adds a kernel that starts at zero: an equal chance for all experts (appendix A)."""
        return self.add_weight(name=name, shape=shape, initializer="zeros")

    def add_router_z_loss(self, logits, counted=None):
        """Adds the weighted z-loss of logits [T, N] of which `counted` [T] take part."""
        if self.router_z_loss_weight:
            z_loss = losses.router_z_loss(logits, counted)
            self.add_loss(losses.in_floatx(self.router_z_loss_weight * z_loss))

    def expert_axis(self, variable):
        return {"gate_kernel": 1, "noise_kernel": 1, "thresholds": 0}.get(variable.name)

    def get_config(self):
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "router_z_loss_weight": self.router_z_loss_weight,
        }


class NoisyGating(Gating):
    """What the gating layers with trainable noise share: noisy top-k choices at one level."""

    def __init__(self, num_experts, noise=True, noise_epsilon=1e-2, seed=None, **kwargs):
        super().__init__(num_experts, **kwargs)
        self.noise = noise
        self.noise_epsilon = check_positive("noise_epsilon", noise_epsilon)
        self.seed = seed
        if noise:
            self.seed_generator = ReplicaSeedGenerator(seed)

    def choose(self, k, logits, noise_logits=None):
        """Picks the K largest of the noisy logits (equations 3 to 5, 8 and 9).

        Args:
            k: K, at most N.
            logits: float32 tensor [T, N], x·W_g.
            noise_logits: float32 tensor [T, N], x·W_noise, or `None` to leave out the noise.

        Returns:
            The choices, `INDEX` [T, K], in decreasing order of H(x), equal logits in increasing
            order of index; their gates, float32 [T, K]; and each expert's chance to be chosen,
            float32 [T, N], `None` where there is no noise, or nothing to choose.
        """
        clean_logits, num_choices = logits, logits.shape[-1]
        if noise_logits is not None:
            stddev = ops.softplus(noise_logits) + self.noise_epsilon
            logits += stddev * keras.random.normal(
                ops.shape(logits), dtype=logits.dtype, seed=self.seed_generator
            )
        # NaN has no order, and no backend promises what its sort makes of one.
        logits = ops.where(logits > LOWEST, logits, LOWEST)
        # One more than K: the load asks for the threshold below the last choice.
        top_logits, top_index = top_k(logits, min(k + 1, num_choices))
        chosen = top_logits[:, :k]
        gates = softmax(chosen, competing=logits) if k == 1 else ops.softmax(chosen)
        gates = spoil(gates, chosen[:, :1] == LOWEST)
        chances = None
        if noise_logits is not None and k < num_choices:
            chances = losses.load(clean_logits, logits, stddev, top_logits)
        return top_index[:, :k], gates, chances

    def get_config(self):
        return {
            **super().get_config(),
            "noise": self.noise,
            "noise_epsilon": self.noise_epsilon,
            "seed": self.seed,
        }


@keras.saving.register_keras_serializable("keras_moe")
class SoftmaxGating(Gating):
    """Dense gating: every expert, weighted by softmax(x·W_g) (equation 2).

    Args:
        num_experts: N, the number of experts.
        router_z_loss_weight: Weight of `losses.router_z_loss`, not negative.
        **kwargs: Keyword arguments of `keras.layers.Layer`, `dtype` excepted.

    Call arguments:
        x: Float tensor [T, D].
        training: Without effect.
        mask: Boolean tensor [T] or `None`; examples with `False` get gates of 0.

    Returns:
        A `Routing` with K = N, the experts of an example in order of index.
    """

    @property
    def k(self):
        """K = N: every expert."""
        return self.num_experts

    def build(self, input_shape):
        super().build(input_shape)
        self.gate_kernel = self.add_kernel("gate_kernel", input_shape[-1], self.num_experts)

    def call(self, x, training=None, mask=None):
        x, mask = self.examples(x, mask)
        logits = exact.matmul(x, self.gate_kernel)
        self.add_router_z_loss(logits, mask)
        gates = softmax(logits, competing=logits)
        expert_index = ops.broadcast_to(
            ops.arange(self.num_experts, dtype="int32"), ops.shape(gates)
        )
        return make_routing(expert_index, gates, self.num_experts, mask)


@keras.saving.register_keras_serializable("keras_moe")
class NoisyTopKGating(NoisyGating):
    """Noisy top-k gating with trainable noise (equations 3 to 5, 8 to 10).

    H(x) = x·W_g + N(0, 1)·(softplus(x·W_noise) + noise_epsilon), G(x) = softmax of the K largest
    entries of H(x). The noise is there in training alone. Equal logits go to the lower index. With
    k = 1 that softmax is constant and would teach the gating nothing, so the gate is then the
    chosen expert's probability under the softmax over all experts.

    Args:
        num_experts: N, the number of experts.
        k: K, the number of experts chosen per example, from 1 to N.
        noise: Whether training adds noise. Without it the load is a count, and has no gradient.
        noise_epsilon: The least standard deviation of the noise, above 0.
        seed: Integer, seed of the noise.
        router_z_loss_weight: Weight of `losses.router_z_loss`, not negative.
        **kwargs: Keyword arguments of `keras.layers.Layer`, `dtype` excepted.

    Call arguments:
        x: Float tensor [T, D].
        training: Whether to add noise and to estimate the load smoothly.
        mask: Boolean tensor [T] or `None`; examples with `False` get gates of 0.

    Returns:
        A `Routing`, the choices of an example in decreasing order of H(x).

    Raises:
        ValueError: If `num_experts` is not an integer of at least 1, `k` not one between 1 and
            `num_experts`, `noise_epsilon` not above 0, or a dtype other than float32 is asked for.
    """

    def __init__(self, num_experts, k=4, noise=True, noise_epsilon=1e-2, seed=None, **kwargs):
        super().__init__(num_experts, noise, noise_epsilon, seed, **kwargs)
        self.k = check_k(k, self.num_experts)

    def build(self, input_shape):
        super().build(input_shape)
        shape = (input_shape[-1], self.num_experts)
        self.gate_kernel = self.add_kernel("gate_kernel", *shape)
        if self.noise:
            self.noise_kernel = self.add_kernel("noise_kernel", *shape)

    def call(self, x, training=None, mask=None):
        x, mask = self.examples(x, mask)
        noisy = training and self.noise
        logits = exact.matmul(x, self.gate_kernel)
        self.add_router_z_loss(logits, mask)
        expert_index, gates, chances = self.choose(
            self.k,
            logits,
            exact.matmul(x, self.noise_kernel) if noisy else None,
        )
        return make_routing(expert_index, gates, self.num_experts, mask, chances)

    def get_config(self):
        return {**super().get_config(), "k": self.k}


def softmax(logits, competing):
    """The share of each of `logits` in the softmax over the logits `competing`."""
    return ops.exp(logits - ops.logsumexp(competing, axis=-1, keepdims=True))


def spoil(gates, broken):
    """Makes gates NaN where `broken`: nobody is chosen there, and nothing is a right answer.

    By 0 / 0, as a constant NaN would be found where no example is broken.
    """
    sound = ops.cast(ops.logical_not(broken), gates.dtype)
    return gates * sound / sound
