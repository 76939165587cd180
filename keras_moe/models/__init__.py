"""The paper's models, their presets and footprints."""

from keras_moe.models.beam_search import Hypotheses, beam_search
from keras_moe.models.footprint import Footprint, footprint
from keras_moe.models.language_model import LanguageModel
from keras_moe.models.presets import PRESETS, TABLE_7, TABLE_8, Preset
from keras_moe.models.sampling import generate
from keras_moe.models.translation_model import TranslationModel
from keras_moe.models.translation_presets import TRANSLATION_PRESETS, TranslationPreset
from keras_moe.models.word_model import Perplexity

__all__ = [
    "PRESETS",
    "TABLE_7",
    "TABLE_8",
    "TRANSLATION_PRESETS",
    "Footprint",
    "Hypotheses",
    "LanguageModel",
    "Perplexity",
    "Preset",
    "TranslationModel",
    "TranslationPreset",
    "beam_search",
    "footprint",
    "generate",
]
