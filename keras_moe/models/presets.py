"""The language models of Tables 7 and 8, by their names there."""

import dataclasses
from collections.abc import Callable

import keras

from keras_moe.arguments import check_size
from keras_moe.mixture.hierarchical_moe import HierarchicalMoE
from keras_moe.mixture.sparse_moe import SparseMoE


@dataclasses.dataclass(frozen=True)
class Preset:
    """The sizes of a `LanguageModel`.

    Models beside the paper's are made by `dataclasses.replace`:

    ```python
    dataclasses.replace(PRESETS["MoE-256"], num_experts=16)
    ```

    Attributes:
        width: D, the size of the embedding and of every layer's output.
        num_lstms: Number of LSTMs.
        lstm_units: Units of each LSTM, its output projected to D; `None` for D units as they are.
        num_experts: N. With 0 there are LSTMs alone, and with 1 an expert without a gating.
        hidden_units: Hidden units of each expert: an integer, or a tuple of them.
        num_groups: A, the first branching of a hierarchical mixture; `None` for a flat one.
        k: Experts per word; of a hierarchical mixture the groups, and the experts in each of them.
        importance_loss_weight: w_importance.
        load_loss_weight: w_load.
        gating: The gating of the mixture, by the name that its layer knows; or a gating class, or a
            function with its first arguments: N and k, or A, N / A and k where there are groups.
        dropout: Part of every layer's output to drop in training.
    """

    width: int = 512
    num_lstms: int = 2
    lstm_units: int | None = None
    num_experts: int = 0
    hidden_units: int | tuple = 1024
    num_groups: int | None = None
    k: int | tuple = 4
    importance_loss_weight: float = 0.1
    load_loss_weight: float = 0.1
    gating: str | Callable = "noisy_top_k"
    dropout: float = 0.1

    def scaled(self, width):
        """Returns the preset of another width, all other sizes of a layer in proportion.

        Raises:
            ValueError: If the width is not an integer of at least 1, or a size becomes a fraction.
        """
        check_size("width", width)

        def scale(size):
            if size * width % self.width:
                raise ValueError(
                    f"All sizes must stay integers: {size} at width {self.width} would become "
                    f"{size * width / self.width:g}. Received: width={width}"
                )
            return size * width // self.width

        several = isinstance(self.hidden_units, tuple)
        return dataclasses.replace(
            self,
            width=width,
            lstm_units=None if self.lstm_units is None else scale(self.lstm_units),
            hidden_units=tuple(map(scale, self.hidden_units))
            if several
            else scale(self.hidden_units),
        )

    def make_middle(self, dtype=None, name=None, seed=None):
        """Returns the mixture of experts, the single expert, or `None` for a model without either.

        Raises:
            ValueError: If the groups can't have the same number of experts.
        """
        if self.num_experts == 0:
            return None
        if self.num_experts == 1:
            return self._make_expert(dtype, name)
        if self.num_groups is not None and self.num_experts % self.num_groups:
            raise ValueError(
                "`num_experts` must be a multiple of `num_groups`. Received: "
                f"num_experts={self.num_experts}, num_groups={self.num_groups}"
            )
        options = {
            "hidden_units": self.hidden_units,
            "k": self.k,
            "gating": self.make_gating(),
            "importance_loss_weight": self.importance_loss_weight,
            "load_loss_weight": self.load_loss_weight,
            "dtype": dtype,
            "name": name,
            "seed": seed,
        }
        if self.num_groups is None:
            return SparseMoE(self.num_experts, **options)
        return HierarchicalMoE(self.num_groups, self.num_experts // self.num_groups, **options)

    def make_gating(self):
        """Returns the `gating` of the mixture's layer: its name, or a layer."""
        if isinstance(self.gating, str):
            return self.gating
        if self.num_groups is None:
            return self.gating(self.num_experts, self.k)
        return self.gating(self.num_groups, self.num_experts // self.num_groups, self.k)

    def _make_expert(self, dtype, name):
        several = isinstance(self.hidden_units, tuple)
        hidden = self.hidden_units if several else [self.hidden_units]
        options = {"use_bias": False, "dtype": dtype}
        return keras.Sequential(
            [
                keras.Input((None, self.width)),
                *[keras.layers.Dense(units, "relu", **options) for units in hidden],
                keras.layers.Dense(self.width, **options),
            ],
            name=name,
        )


def _flat(num_experts, **sizes):
    return Preset(num_experts=num_experts, **sizes)


def _hierarchical(num_groups, num_experts, **sizes):
    return Preset(num_groups=num_groups, num_experts=num_experts, k=(2, 2), **sizes)


# The 1-Billion-Word benchmark: 10 epochs on 16 GPUs, thus 16 groups.
TABLE_7 = {
    "LSTM-2048-512": Preset(num_lstms=1, lstm_units=2048),
    "4xLSTM-512": Preset(num_lstms=4),
    "MoE-1-Wide": Preset(num_experts=1, hidden_units=4096),
    "MoE-1-Deep": Preset(num_experts=1, hidden_units=(1024,) * 4),
    "MoE-4": _flat(4),
    "MoE-32": _flat(32),
    "MoE-256": _flat(256),
    "MoE-256-h": _hierarchical(16, 256),
    "MoE-1024-h": _hierarchical(16, 1024, dropout=0.2),
    "MoE-4096-h": _hierarchical(16, 4096, dropout=0.2),
    "MoE-34M": _hierarchical(16, 1024, width=1024, hidden_units=2048, dropout=0.3),
    "MoE-143M": _hierarchical(16, 256, width=1024, lstm_units=4096, hidden_units=8192, dropout=0.4),
}

# 100 billion words, read once: Table 8 names no dropout, and nothing is seen twice.
TABLE_8 = {
    "4xLSTM-512": Preset(num_lstms=4, dropout=0.0),
    "MoE-32": _flat(32, dropout=0.0),
    "MoE-256-h": _hierarchical(32, 256, dropout=0.0),
    "MoE-1024-h": _hierarchical(32, 1024, dropout=0.0),
    "MoE-4096-h": _hierarchical(64, 4096, dropout=0.0),
    "MoE-16384-h": _hierarchical(128, 16384, dropout=0.0),
    "MoE-65536-h": _hierarchical(256, 65536, dropout=0.0),
    "MoE-131072-h": _hierarchical(256, 131072, dropout=0.0),
}

# By name alone: a row of both tables is that of Table 7, and `TABLE_8[name]` the other.
PRESETS = {**TABLE_8, **TABLE_7}


def get_preset(preset, presets=PRESETS):
    """Returns a preset by its name among others, or as it is.

    Raises:
        ValueError: If there is none.
    """
    kind = type(next(iter(presets.values())))
    if type(preset) is kind:
        return preset
    if isinstance(preset, Preset) or preset not in presets:
        raise ValueError(
            f"The preset must be a `{kind.__name__}` or one of {', '.join(presets)}. "
            f"Received: {preset!r}"
        )
    return presets[preset]
