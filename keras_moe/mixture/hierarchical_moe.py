"""The two-level mixture of experts (appendix B of the paper): the layer."""

import keras

from keras_moe.arguments import as_pair, check_size
from keras_moe.gating.hierarchical import HierarchicalGating
from keras_moe.gating.hierarchical_balanced import HierarchicalBalancedGating
from keras_moe.mixture.parts import check_gating, check_number
from keras_moe.mixture.sparse_moe import SparseMoE


@keras.saving.register_keras_serializable("keras_moe")
class HierarchicalMoE(SparseMoE):
    """Hierarchical mixture of experts (Shazeer et al., 2017, equation 12).

    y = Σ_i Σ_j G_primary(x)_i · G_i(x)_j · E_ij(x): a `SparseMoE` of A·B experts in A groups of B.
    Its gating picks groups first and then experts of those groups, so that it costs one product
    with D·A numbers and one with D·B for each chosen group in place of one with D·A·B.

    Example:
    ```python
    keras_moe.HierarchicalMoE(16, 16, hidden_units=1024, k=(2, 2))  # 4 of 256 experts
    ```

    Args:
        num_groups: A, the number of groups.
        experts_per_group: B, the number of experts in each group.
        hidden_units: As in `SparseMoE`.
        k: Pair of integers: the groups per example, from 1 to A, and the experts in each of them,
            from 1 to B. Without effect on a gating layer of your own.
        gating: `"noisy_top_k"` (`HierarchicalGating`), `"strictly_balanced"`
            (`HierarchicalBalancedGating`), or a gating layer for A·B experts.
        **kwargs: All other keyword arguments of `SparseMoE`, for A·B experts.

    Attributes:
        gating: The gating layer; `gating.primary` [D, A], `gating.secondary` [A, D, B], and the
            kernels of their noise, `gating.primary_noise` and `gating.secondary_noise`.
        experts: The bank of all A·B experts, group by group.

    Call arguments, returns: As in `SparseMoE`.

    Raises:
        ValueError: If a size is below 1, `k` is not a pair of integers within the sizes, or
            `SparseMoE` refuses another argument.
    """

    def __init__(
        self,
        num_groups,
        experts_per_group,
        hidden_units=None,
        k=(2, 2),
        **kwargs,
    ):
        # Before `super`, which makes the gating.
        self.num_groups = check_size("num_groups", num_groups)
        self.experts_per_group = check_size("experts_per_group", experts_per_group)
        super().__init__(
            self.num_groups * self.experts_per_group, hidden_units, as_pair(k), **kwargs
        )

    def _make_gating(self, gating, k):
        sizes = {"num_groups": self.num_groups, "experts_per_group": self.experts_per_group}
        if gating == "noisy_top_k":
            return HierarchicalGating(
                **sizes,
                k=k,
                static_shapes=self.capacity_factor is not None,
                expert_parallel=self.expert_parallel,
                router_z_loss_weight=self.router_z_loss_weight,
                seed=self.seed,
                name="gating",
            )
        if gating == "strictly_balanced":
            return HierarchicalBalancedGating(
                **sizes,
                k=k,
                static_shapes=self.capacity_factor is not None,
                router_z_loss_weight=self.router_z_loss_weight,
                name="gating",
            )
        for name, size in sizes.items():
            check_number(gating, name, size)
        names = '"noisy_top_k", "strictly_balanced"'
        return check_gating(gating, names, self.router_z_loss_weight)

    def get_config(self):
        config = super().get_config()
        del config["num_experts"]  # The product of the first two.
        return {
            "num_groups": self.num_groups,
            "experts_per_group": self.experts_per_group,
            **config,
        }
