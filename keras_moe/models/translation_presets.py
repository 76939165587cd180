"""The translation models of sections 5.3 and 5.4, by their names there."""

import dataclasses
from collections.abc import Callable

from keras_moe.gating.hierarchical_balanced import HierarchicalBalancedGating
from keras_moe.gating.strictly_balanced import StrictlyBalancedGating
from keras_moe.models.presets import Preset

VOCABULARY_SIZE = 32_000  # The paper's "32K wordpieces".


@dataclasses.dataclass(frozen=True)
class TranslationPreset(Preset):
    """The sizes of a `TranslationModel` (appendix E): those of `Preset`, with these differences.

    Attributes:
        num_lstms: Pair of integers: the LSTMs of the encoder, the two directions of its first layer
            counted apart, and those of the decoder.
        lstm_units: Units of each LSTM, its output projected to D.
        num_experts: N of each of the two mixtures. With 0 there is none.
        batchwise_loss_weight: Weight of L_batchwise, a sum over the batch, beside the cross-entropy
            per word: about one over the words of a batch. The paper names none; with 1 the mixtures
            would learn to please their thresholds before they learn to translate.
    """

    num_lstms: tuple = (3, 2)
    lstm_units: int = 2048
    hidden_units: int | tuple = 2048
    importance_loss_weight: float = 0.01
    load_loss_weight: float = 0.01
    gating: str | Callable = "strictly_balanced"
    batchwise_loss_weight: float = 1e-4
    dropout: float = 0.4

    def make_gating(self):
        """Returns the `gating` of the mixture's layer: its name, or a layer."""
        if self.gating != "strictly_balanced":
            return super().make_gating()
        options = {"batchwise_loss_weight": self.batchwise_loss_weight, "name": "gating"}
        if self.num_groups is None:
            return StrictlyBalancedGating(self.num_experts, self.k, **options)
        members = self.num_experts // self.num_groups
        return HierarchicalBalancedGating(self.num_groups, members, self.k, **options)


# As in Table 7, the first branching of a hierarchical mixture is the number of GPUs: up to 64.
TRANSLATION_PRESETS = {
    "no-experts": TranslationPreset(),
    "MoE-32": TranslationPreset(num_experts=32),
    "MoE-512": TranslationPreset(num_experts=512, num_groups=64, k=(2, 2)),
    "MoE-2048": TranslationPreset(num_experts=2048, num_groups=64, k=(2, 2)),
    # The paper names no dropout for it; its training data is larger than any single pair's.
    "multilingual": TranslationPreset(
        num_experts=512, hidden_units=8192, k=2, gating="noisy_top_k"
    ),
}
