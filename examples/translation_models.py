"""The models that `translation.py` trains: a preset, with what the command line changes of it."""

import dataclasses

from normalized_gating import NormalizedGating

from keras_moe.models import TRANSLATION_PRESETS, TranslationModel

NORMALIZED = "normalized"
# Of the command line: triples of name, default value and meaning.
OPTIONS = (
    ("width", 64, "units of the embeddings and of every layer"),
    ("num-experts", 0, "experts of each mixture; 0 for the preset's"),
    ("k", 0, "experts per word; 0 for the preset's"),
    (
        "gating",
        "preset",
        f"of the mixtures: noisy_top_k, strictly_balanced, or {NORMALIZED} for noisy top-k gating "
        "by normalized_gating.py",
    ),
    ("balance-loss-weight", 0.01, "weight of the importance loss and of the load loss"),
    ("dropout", 0.2, "part of every layer's output to drop; the paper's is 0.4"),
)


def make_model(preset, vocabulary_size, args):
    """Returns the model of a preset, its sizes scaled to the width.

    Args:
        preset: A name in `TRANSLATION_PRESETS`.
        vocabulary_size: Word pieces that the model knows.
        args: A namespace of `OPTIONS` and a `seed`.

    Raises:
        ValueError: If there is no such preset or gating.
    """
    sizes = TRANSLATION_PRESETS.get(preset, preset)  # A name that isn't there is refused below.
    if sizes is not preset and sizes.num_experts:
        sizes = dataclasses.replace(
            sizes,
            importance_loss_weight=args.balance_loss_weight,
            load_loss_weight=args.balance_loss_weight,
            **_changes(args),
        )
    return TranslationModel.from_preset(
        sizes, vocabulary_size, args.width, dropout=args.dropout, seed=args.seed, name=preset
    )


def _changes(args):
    """What the command line names in place of the preset's."""
    changes = {name: getattr(args, name) for name in ("num_experts", "k") if getattr(args, name)}
    if args.gating != "preset":
        changes["gating"] = NormalizedGating if args.gating == NORMALIZED else args.gating
    return changes
