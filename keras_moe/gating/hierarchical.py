"""Noisy top-k gating at two levels (appendix B of the paper).

The experts stand in A groups of B. A primary gating picks groups, a secondary gating of each group
picks among that group's experts. To dispatch, experts and combine that is a routing like any
other: expert j of group i is the leaf i·B + j of A·B.
"""

import keras
from keras import ops

from keras_moe import dispatch, losses
from keras_moe.arguments import check_pair, check_size
from keras_moe.backend import STATIC_SHAPES, choices, collectives, exact
from keras_moe.dispatch.products import exact_products
from keras_moe.distribute.exchange import on_their_replicas
from keras_moe.distribute.shards import sharded_rows
from keras_moe.gating.leaves import leaves
from keras_moe.gating.noisy_top_k import NoisyGating
from keras_moe.gating.routing import Routing, make_routing


@keras.saving.register_keras_serializable("keras_moe")
class HierarchicalGating(NoisyGating):
    """Noisy top-k gating at two levels (equations 12 to 14).

    The gate of expert j of group i is the product G_primary(x)_i · G_i(x)_j of two noisy top-k
    gatings, each as in `NoisyTopKGating`. Each example meets the secondary kernels of the groups
    chosen for it, and no others.

    In noisy training the load of an expert is Load_primary(X)_i · Load_i(X⁽ⁱ⁾)_j / |X⁽ⁱ⁾|, where
    X⁽ⁱ⁾ are the examples that group i receives; 0 for a group that receives none. A level whose
    every choice is taken has nothing to estimate and is counted. Without noise both are, and the
    fraction is the number of rows of the expert.

    Example:
    ```python
    gating = keras_moe.HierarchicalGating(num_groups=4, experts_per_group=3, k=(2, 1))
    layer = keras_moe.HierarchicalMoE(4, 3, hidden_units=16, gating=gating)
    ```

    Args:
        num_groups: A, the number of groups.
        experts_per_group: B, the number of experts in each group.
        k: Pair of integers: the groups chosen per example, from 1 to A, and the experts chosen in
            each of them, from 1 to B.
        noise: Whether training adds noise, at both levels.
        noise_epsilon: The least standard deviation of the noise, above 0.
        seed: Integer, seed of the noise.
        static_shapes: Whether to compute in shapes that the shape of `x` alone determines, as XLA
            needs them: at up to twice the operations of the second level.
        router_z_loss_weight: Weight of the `losses.router_z_loss` of both levels: of the groups'
            logits, and of the logits within every group that an example receives.
        **kwargs: Keyword arguments of `keras.layers.Layer`, `dtype` excepted.

    Attributes:
        primary: Variable [D, A], W_g of the groups.
        secondary: Variable [A, D, B], W_g of the experts of each group.
        primary_noise: Variable [D, A], W_noise of the groups; only with `noise`.
        secondary_noise: Variable [A, D, B], W_noise of the experts; only with `noise`.

    Call arguments:
        x: Float tensor [T, D].
        training: Whether to add noise and to estimate the load smoothly.
        mask: Boolean tensor [T] or `None`; examples with `False` get gates of 0.

    Returns:
        A `Routing` to N = A·B experts, group by group, with the product of both `k` as its K. The
        choices of an example come group by group, both in decreasing order of their noisy logits.

    Raises:
        ValueError: If a size is below 1, `k` is not a pair of integers within the sizes, or
            `noise_epsilon` is not above 0; in `build` if the replicas cannot hold as many groups
            each.
    """

    unit = "groups"

    def __init__(
        self,
        num_groups,
        experts_per_group,
        k=(2, 2),
        noise=True,
        noise_epsilon=1e-2,
        seed=None,
        static_shapes=False,
        expert_parallel=False,
        **kwargs,
    ):
        num_groups = check_size("num_groups", num_groups)
        experts_per_group = check_size("experts_per_group", experts_per_group)
        k = check_pair(k, num_groups, experts_per_group)
        super().__init__(num_groups * experts_per_group, noise, noise_epsilon, seed, **kwargs)
        self.num_groups = num_groups
        self.experts_per_group = experts_per_group
        self.k = k
        self.static_shapes = static_shapes
        self.expert_parallel = expert_parallel
        self.supports_jit = static_shapes or STATIC_SHAPES

    def build(self, input_shape):
        super().build(input_shape)
        primary = (input_shape[-1], self.num_groups)
        secondary = (self.num_groups, input_shape[-1], self.experts_per_group)
        self.primary = self.add_kernel("primary", *primary)
        self.secondary = self._add_secondary("secondary", *secondary)
        if self.noise:
            self.primary_noise = self.add_kernel("primary_noise", *primary)
            self.secondary_noise = self._add_secondary("secondary_noise", *secondary)

    def _add_secondary(self, name, *shape):
        if not self.expert_parallel:
            return self.add_kernel(name, *shape)
        with sharded_rows(self.num_groups, "groups"):
            return self.add_kernel(name, *shape)

    def call(self, x, training=None, mask=None):
        x, mask = self.examples(x, mask)
        noisy = training and self.noise
        logits = exact.matmul(x, self.primary)
        self.add_router_z_loss(logits, mask)
        group, gates, chances = self.choose(
            self.k[0],
            logits,
            exact.matmul(x, self.primary_noise) if noisy else None,
        )
        primary = make_routing(group, gates, self.num_groups, mask, chances)

        # From here on there is one row for each choice of a group: T·K_primary.
        kernels = [self.secondary, self.secondary_noise] if noisy else [self.secondary]
        logits, *noise_logits = self._multiply(x, kernels, primary)
        self.add_router_z_loss(logits, ops.reshape(primary.gates > 0, (-1,)))
        member, gates, chances = self.choose(
            self.k[1],
            logits,
            noise_logits[0] if noisy else None,
        )
        leaf = leaves(group, member, self.experts_per_group)
        gates = ops.reshape(gates * ops.reshape(primary.gates, (-1, 1)), ops.shape(leaf))

        secondary_load = self._secondary_load(primary, leaf, gates, chances)
        received = losses.hard_load(primary.gates, group, self.num_groups)  # |X⁽ⁱ⁾|
        # Of the batch of all replicas: so the loads of all replicas add up to that batch's load.
        primary_load, received = ops.unstack(
            collectives.all_sum(ops.stack([primary.load, received]))
        )
        share = primary_load / ops.maximum(received, 1.0)
        return Routing(
            expert_index=ops.cast(leaf, "int32"),
            gates=gates,
            importance=losses.importance(gates, leaf, self.num_experts),
            load=ops.reshape(share[:, None] * secondary_load, (-1,)),
        )

    def _multiply(self, x, kernels, primary):
        """Each example times the kernels of its groups: of each [T·K_primary, B], by choices."""

        def products(rows, plan):
            return exact_products(rows, kernels, plan.rows_per_expert, self.static_shapes)

        if not self.expert_parallel or collectives.num_replicas() == 1:
            plan = dispatch.make_plan(primary, self.num_groups)
            rows = products(dispatch.dispatch(x, plan), plan)
            return [dispatch.collect(part, plan) for part in rows]
        collectives.check_can_communicate()
        num_local = self.num_groups // collectives.num_replicas()

        def on_replica(batch):
            x, chosen = batch
            plan = dispatch.make_plan(chosen, self.num_groups)
            rows = on_their_replicas(
                lambda rows, plan: ops.concatenate(products(rows, plan), axis=-1),
                dispatch.dispatch(x, plan),
                plan.rows_per_expert,
                lambda received: dispatch.make_plan(received, num_local),
            )
            rows = dispatch.collect(rows, plan)
            return ops.reshape(rows, (-1, self.k[0], rows.shape[-1])), None

        chosen = dispatch.Choices(primary.expert_index, primary.gates)
        rows, _ = collectives.on_replicas(on_replica, (x, chosen), kernels)
        rows = ops.reshape(rows, (-1, rows.shape[-1]))
        return ops.split(rows, len(kernels), axis=-1)

    def _secondary_load(self, primary, leaf, gates, chances):
        """Load_i(X⁽ⁱ⁾)_j of each group i and its expert j, [A, B]."""
        if chances is None:
            load = losses.hard_load(gates, leaf, self.num_experts)
            return ops.reshape(load, (self.num_groups, self.experts_per_group))
        received = ops.reshape(primary.gates > 0, (-1, 1))
        counted = ops.logical_and(received, ops.isfinite(chances))
        chances = ops.where(counted, chances, 0.0)
        chances = ops.reshape(chances, (*ops.shape(primary.gates), self.experts_per_group))
        return choices.sum_by_expert(chances, primary.expert_index, self.num_groups)

    def expert_axis(self, variable):
        axes = {"primary": 1, "primary_noise": 1, "secondary": 0, "secondary_noise": 0}
        return axes.get(variable.name)

    def get_config(self):
        config = super().get_config()
        del config["num_experts"]  # The product of the first two.
        return {
            "num_groups": self.num_groups,
            "experts_per_group": self.experts_per_group,
            "k": self.k,
            "static_shapes": self.static_shapes,
            "expert_parallel": self.expert_parallel,
            **config,
        }
