"""Training of both models of words, without noise: the same under each backend.

As a program, run under TensorFlow, it goes both courses in a folder where JAX has left its files.
"""

import sys
from pathlib import Path

import keras
import numpy as np
from helpers import next_words

import keras_moe
from keras_moe import NoisyTopKGating, SparseMoE
from keras_moe.models import LanguageModel, TranslationModel
from keras_moe.optimizers import FactoredAdam

VOCABULARY, END, STEPS = 50, 40, {"language": 50, "translation": 8}
# What a backend draws is its own: neither dropout nor a sample of words. The optimizer is one that
# adds up the slices of an embedding's gradient: Keras' Adam squares each, under TensorFlow alone.
ALIKE = {"dropout": 0.0, "num_sampled": None, "seed": 0}


def language():
    """The demo's model and its schedule, of width 8 instead of 64, with 8 experts."""
    gating = NoisyTopKGating(8, 4, noise=False)
    model = LanguageModel(VOCABULARY, 8, SparseMoE(8, 16, gating=gating, name="moe"), **ALIKE)
    model.build((None, None))
    schedule = keras.optimizers.schedules.CosineDecay(0.01, STEPS["language"])
    model.compile(FactoredAdam(schedule))
    x, y = next_words(batch=8)
    return model, x, y


def translation():
    """A capacity, biases, attention to sources of any length."""
    gating = NoisyTopKGating(4, 2, noise=False)
    moe = SparseMoE(4, 6, gating=gating, use_bias=True, capacity_factor=1.5, name="moe")
    model = TranslationModel(VOCABULARY, 8, None, moe, lstm_units=8, num_lstms=(2, 1), **ALIKE)
    model.build((None, None))
    model.compile(FactoredAdam(0.01))
    source, y = next_words(batch=8)
    before = np.concatenate([np.full((8, 1), END), y[:, :-1]], axis=1)
    return model, (source, before), y


def go(model, x, y, steps):
    """The losses of some steps."""
    history = model.fit(x, y, batch_size=8, epochs=steps, shuffle=False, verbose=0).history
    return history["loss"]


def course(make, name, folder):
    """Goes the whole way and writes what it was halfway; returns the model and its losses."""
    model, x, y = make()
    keras_moe.load_weights(model, folder / f"{name}.start.weights.h5")
    half = STEPS[name] // 2
    losses = go(model, x, y, half)
    if name == "language":
        model.save(folder / f"language.{keras.config.backend()}.keras")
    else:
        model.save_weights(folder / f"translation.{keras.config.backend()}.weights.h5")
    return model, losses + go(model, x, y, half)


def second_half(model, make, name, folder, of):
    """The losses of the second half, from the file that another backend has written."""
    _, x, y = make()
    if name == "language":
        model = keras.models.load_model(folder / f"language.{of}.keras")
    else:
        keras_moe.load_weights(model, folder / f"translation.{of}.weights.h5")
    return go(model, x, y, STEPS[name] // 2)


def translated(model, folder):
    """The hypotheses that a model halfway, as TensorFlow has it, finds for sources."""
    keras_moe.load_weights(model, folder / "translation.tensorflow.weights.h5")
    source = next_words(batch=3)[0]
    return np.asarray(
        model.translate(source, END, beam_width=3, max_length=5, length_penalty=0.0).ids
    )


COURSES = {"language": language, "translation": translation}

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    results = {}
    for name, make in COURSES.items():
        model, results[name] = course(make, name, folder)
        results[f"{name} of jax"] = second_half(model, make, name, folder, "jax")
    results["ids"] = translated(model, folder)
    np.savez(folder / "tensorflow.npz", **results)
