"""The paper's models, their presets and footprints."""

from keras_moe.models.footprint import Footprint, footprint
from keras_moe.models.language_model import LanguageModel, Perplexity
from keras_moe.models.presets import PRESETS, TABLE_7, TABLE_8, Preset
from keras_moe.models.sampling import generate

__all__ = [
    "PRESETS",
    "TABLE_7",
    "TABLE_8",
    "Footprint",
    "LanguageModel",
    "Perplexity",
    "Preset",
    "footprint",
    "generate",
]
