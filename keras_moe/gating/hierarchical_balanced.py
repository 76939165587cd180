"""Strictly balanced gating at two levels (appendices B and F of the paper)."""

import keras
from keras import ops

from keras_moe import dispatch
from keras_moe.arguments import check_pair, check_size
from keras_moe.backend import exact
from keras_moe.dispatch.products import exact_products
from keras_moe.gating.leaves import leaves
from keras_moe.gating.routing import make_routing
from keras_moe.gating.strictly_balanced import (
    BalancedGating,
    keep_best,
    keep_best_of_groups,
    scored,
)


@keras.saving.register_keras_serializable("keras_moe")
class HierarchicalBalancedGating(BalancedGating):
    """Strictly balanced gating of groups of experts, and of the experts in each group.

    The paper's larger translation models have hierarchical mixtures with strictly balanced gating
    and do not say how the two go together. Here both levels are as `StrictlyBalancedGating`: each
    of the A groups keeps in training the ceil(k_primary·|X| / A) examples of the batch that it
    scores highest, X⁽ⁱ⁾, and of those each of its B experts the ceil(k_secondary·|X⁽ⁱ⁾| / B) that
    it scores highest. At inference groups and experts take the examples above thresholds of their
    own. The gate of expert j of group i is the product G_primary(x)_i · G_i(x)_j (equation 12).
    Each example meets the secondary kernels of its groups and no others.

    Example:
    ```python
    layer = keras_moe.HierarchicalMoE(
        2, 3, hidden_units=16, k=(1, 1), gating="strictly_balanced"
    )
    ```

    Args:
        num_groups: A, the number of groups.
        experts_per_group: B, the number of experts in each group.
        k: Pair of integers: the groups per example on average, from 1 to A, and the experts in each
            of them, from 1 to B.
        batchwise_loss_weight: Weight of L_batchwise of both levels, not negative.
        static_shapes: Whether to compute in shapes that the shape of `x` alone determines, as XLA
            needs them: then K = N, and most gates are 0.
        router_z_loss_weight: Weight of the `losses.router_z_loss` of both levels.
        **kwargs: Keyword arguments of `keras.layers.Layer`, `dtype` excepted.

    Attributes:
        primary: Variable [D, A], W_g of the groups.
        secondary: Variable [A, D, B], W_g of the experts of each group.
        primary_thresholds: Variable [A], T of the groups.
        secondary_thresholds: Variable [A, B], T of the experts.

    Call arguments:
        x: Float tensor [T, D].
        training: Whether groups and experts choose, and L_batchwise of both is added.
        mask: Boolean tensor [T] or `None`; nobody chooses an example with `False`.

    Returns:
        A `Routing` to N = A·B experts, group by group. The choices of an example come group by
        group, both in decreasing order of the gates.

    Raises:
        ValueError: If a size is below 1, `k` is not a pair of integers within the sizes, a weight
            is negative, or a dtype other than float32 is asked for.
    """

    unit = "groups"

    def __init__(
        self,
        num_groups,
        experts_per_group,
        k=(2, 2),
        batchwise_loss_weight=1.0,
        static_shapes=False,
        **kwargs,
    ):
        self.num_groups = check_size("num_groups", num_groups)
        self.experts_per_group = check_size("experts_per_group", experts_per_group)
        num_experts = self.num_groups * self.experts_per_group
        super().__init__(num_experts, batchwise_loss_weight, static_shapes, **kwargs)
        self.k = check_pair(k, self.num_groups, self.experts_per_group)

    def build(self, input_shape):
        super().build(input_shape)
        groups, width, members = self.num_groups, input_shape[-1], self.experts_per_group
        self.primary = self.add_kernel("primary", width, groups)
        self.primary_thresholds = self.add_kernel("primary_thresholds", groups)
        self.secondary = self.add_kernel("secondary", groups, width, members)
        self.secondary_thresholds = self.add_kernel("secondary_thresholds", groups, members)

    def call(self, x, training=None, mask=None):
        x, mask = self.examples(x, mask)
        logits = exact.matmul(x, self.primary)
        self.add_router_z_loss(logits, mask)
        scores, counted = scored(logits, mask)
        kept = keep_best(scores, counted, self.k[0], mask) if training else None
        index, gates = self.choose(scores, self.primary_thresholds, counted, kept)
        primary = make_routing(index, gates, self.num_groups, mask)

        # From here on there is one row for each choice of a group: T·K_primary.
        group, received = ops.reshape(index, (-1,)), ops.reshape(primary.gates > 0, (-1,))
        logits = self._multiply(x, primary)
        self.add_router_z_loss(logits, received)
        scores, counted = scored(logits, received)
        kept = None
        if training:
            kept = keep_best_of_groups(scores, counted, self.k[1], group, received, self.num_groups)
        thresholds = dispatch.spread(self.secondary_thresholds, group)
        member, gates = self.choose(scores, thresholds, counted, kept)
        leaf = leaves(index, member, self.experts_per_group)
        gates = ops.reshape(gates * ops.reshape(primary.gates, (-1, 1)), ops.shape(leaf))
        return make_routing(leaf, gates, self.num_experts)

    def _multiply(self, x, primary):
        """Each example times the kernels of its groups: [T·K_primary, B], by choices."""
        plan = dispatch.make_plan(primary, self.num_groups)
        rows = dispatch.dispatch(x, plan)
        (products,) = exact_products(
            rows, [self.secondary], plan.rows_per_expert, self.static_shapes
        )
        return dispatch.collect(products, plan)

    def expert_axis(self, variable):
        axes = {"primary": 1, "primary_thresholds": 0, "secondary": 0, "secondary_thresholds": 0}
        return axes.get(variable.name)

    def get_config(self):
        config = super().get_config()
        del config["num_experts"]  # The product of the first two.
        return {
            "num_groups": self.num_groups,
            "experts_per_group": self.experts_per_group,
            "k": self.k,
            **config,
        }
