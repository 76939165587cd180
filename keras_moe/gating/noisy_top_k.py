"""Noisy top-k gating, and what both of its levels share in a hierarchical one."""

import keras
import numpy as np
from keras import ops

from keras_moe import losses
from keras_moe.arguments import check_k, check_positive
from keras_moe.backend import choices, exact
from keras_moe.distribute.noise import ReplicaSeedGenerator
from keras_moe.gating.gating import Gating, softmax, spoil
from keras_moe.gating.routing import make_routing

# Stands for NaN among the logits: finite, since `tf.debugging.enable_check_numerics` stops at the
# first infinity, be it where nothing is wrong.
LOWEST = float(np.finfo("float32").min)


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
        top_logits, top_index = choices.top_k(logits, min(k + 1, num_choices))
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
class NoisyTopKGating(NoisyGating):
    """Noisy top-k gating with trainable noise (equations 3 to 5, 8 to 10).

    H(x) = x·W_g + N(0, 1)·(softplus(x·W_noise) + noise_epsilon), G(x) = softmax of the K largest
    entries of H(x). The noise is there in training alone. Equal logits go to the lower index. With
    k = 1 that softmax is constant and would teach the gating nothing, so the gate is then the
    chosen expert's probability under the softmax over all experts.

    In training noise spreads the examples, and the balance losses see them so. In use there is
    none: where logits differ less among examples than the noise does, few experts may then get
    nearly all. The logs tell it from the first epoch on: `max_over_mean_load` is near 1 in training
    and far above in validation.

    Example:
    ```python
    gating = keras_moe.NoisyTopKGating(num_experts=8, k=2, noise=False)
    layer = keras_moe.SparseMoE(8, hidden_units=16, gating=gating)
    ```

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
