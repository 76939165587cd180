"""What the paper's tables count: operations per word, and parameters."""

import math
from typing import NamedTuple

from keras_moe.backend.given import without_values
from keras_moe.mixture.sparse_moe import SparseMoE
from keras_moe.models.language_model import LanguageModel
from keras_moe.models.translation_model import TranslationModel
from keras_moe.models.translation_presets import VOCABULARY_SIZE, TranslationPreset


class Footprint(NamedTuple):
    """The size of a model, as the tables of its kind count it.

    Attributes:
        ops_per_timestep: Multiply-adds of the forward pass for one word.
        parameters: Number of parameters.
    """

    ops_per_timestep: int
    parameters: int


def footprint(model):
    """Counts operations and parameters as the paper's tables do.

    Operations are the multiply-adds of all matrices that a word meets: of the LSTMs, of the k
    experts chosen and of shared ones, and of the gating with the matrices of its noise; in a
    hierarchical gating those of all groups and those within the groups chosen. Whatever is no
    product of matrices is left out.

    For language models (Tables 7 and 8) so are embedding and softmax, in both counts. For
    translation models (Tables 2 to 5) the operations are those of one word of the source and one of
    the target, the softmax counts, and all parameters do. So the published figures of GNMT come
    out, 214M and 278M: 180M in its LSTMs, 33M in the softmax and in each embedding. The product of
    each word of the target with each of the source, which attention is, is left out.

    Example:
    ```python
    counted = keras_moe.models.footprint("MoE-131072-h")
    print(f"{counted.ops_per_timestep:,} operations, {counted.parameters:,} parameters")
    # 9,699,328 operations, 137,577,631,744 parameters
    ```

    Args:
        model: A `LanguageModel` or `TranslationModel`; or a `Preset`, a `TranslationPreset` or the
            name of a `Preset`, whose model is then built without its values, so that 137 billion
            parameters are counted at once. A `TranslationPreset` has 32,000 word pieces.

    Returns:
        A `Footprint`. Frozen parts count as all others do.

    Raises:
        ValueError: If `model` is a model that is not built, or no preset has that name.
    """
    if not isinstance(model, (LanguageModel, TranslationModel)):
        with without_values():
            model = _built(model)
    elif not model.built:
        raise ValueError(
            f"`model` must be built, as by its first call, to have something to count. "
            f"Received: {model!r}, which has no weights yet"
        )
    layers = [layer for layer in model.counted_layers if layer is not None]
    whole = isinstance(model, TranslationModel)
    return Footprint(
        sum(_operations(layer) for layer in layers),
        sum(_size(w) for part in ([model] if whole else layers) for w in part.weights),
    )


def _built(preset):
    """The model of a preset."""
    if isinstance(preset, TranslationPreset):
        model = TranslationModel.from_preset(preset, VOCABULARY_SIZE)
    else:
        model = LanguageModel.from_preset(preset, vocabulary_size=1)
    for layer in model.counted_layers:
        if isinstance(layer, SparseMoE):
            # By their `build`: a symbolic call would multiply by what has no shape.
            for part in (layer.gating, layer.experts):
                part.build((None, model.width))
    model.build((None, None))
    return model


def _operations(layer):
    """Multiply-adds for one word."""
    if not isinstance(layer, SparseMoE):
        return _matrices(layer)
    chosen, num_experts = math.prod(_as_tuple(layer.k)), layer.num_experts
    operations = _matrices(layer.gating) + _kernels(layer.experts) * chosen // num_experts
    if layer.shared_experts is not None:
        operations += _kernels(layer.shared_experts)
    if hasattr(layer.gating, "secondary"):  # Variables [A, D, B], of A groups.
        secondary = [w for w in layer.gating.weights if len(w.shape) == 3]
        operations += sum(map(_size, secondary)) * layer.gating.k[0] // layer.gating.num_groups
    return operations


def _matrices(layer):
    """The sizes of all matrices of a layer. A bias multiplies nothing, nor does a threshold."""
    weights = [w for w in layer.weights if "thresholds" not in w.name]
    return sum(_size(weight) for weight in weights if len(weight.shape) == 2)


def _kernels(bank):
    """The sizes of the matrices of all experts of a bank."""
    return sum(_size(weight) for weight in bank.weights if weight.expert_rank == 2)


def _size(weight):
    return math.prod(weight.shape)


def _as_tuple(k):
    return k if isinstance(k, tuple) else (k,)
