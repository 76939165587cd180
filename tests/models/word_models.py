"""Small models of words and their data, for tests over both kinds of model."""

import keras
import numpy as np

from keras_moe import SparseMoE
from keras_moe.models import LanguageModel, TranslationModel

VOCABULARY = 20
MODELS = ("language", "translation")
TOKENS = np.array([[2, 5, 9, 7], [2, 8, 0, 0], [2, 3, 4, 0]])
TARGETS = np.array([[5, 9, 7, 2], [8, 2, 0, 0], [3, 4, 2, 0]])
SOURCE = np.array([[6, 7, 8, 9, 3], [5, 4, 0, 0, 0], [9, 0, 0, 0, 0]])


def make(name, middle=False, **options):
    """A built model whose numbers are the same in training as outside, but for noise."""
    keras.utils.set_random_seed(0)
    moe = {"k": 2, "dtype": options.get("dtype")}
    middles = [SparseMoE(3, 4, name=f"moe_{i}", **moe) if middle else None for i in range(2)]
    options = {"num_sampled": None, "dropout": 0.0, "seed": 0, **options}
    if name == "language":
        model = LanguageModel(VOCABULARY, 8, middles[0], **options)
    else:
        model = TranslationModel(VOCABULARY, 8, *middles, num_lstms=(2, 1), lstm_units=8, **options)
    model.build((None, None))
    return model


def inputs(name, dtype="int32"):
    """What the model is called with."""
    tokens = TOKENS.astype(dtype)
    return tokens if name == "language" else (SOURCE.astype(dtype), tokens)


def losses(model, name):
    """Cross-entropy of each target [B, L], 0 for padding."""
    log_probs = keras.ops.convert_to_numpy(model(inputs(name)))
    chosen = np.take_along_axis(log_probs, TARGETS[..., None], axis=-1)[..., 0]
    return np.where(TARGETS > 0, -chosen, 0.0)
