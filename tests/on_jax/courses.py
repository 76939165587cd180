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

VOCABULARY, END, STEPS = 50, 40, {"language": 30, "translation": 8}
# What a backend draws is its own: neither dropout nor a sample of words. The optimizer is one that
# adds up the slices of an embedding's gradient: Keras' Adam squares each, under TensorFlow alone.
ALIKE = {"dropout": 0.0, "num_sampled": None, "seed": 0}
# Seeds with which no word is ever undecided between two experts: its k-th logit and the next differ
# by more than 0.0015 in the one course, 0.006 in the other. Were they as near as rounding, either
# might be chosen, and the loss of that step were another.
SEEDS = {"language": 14, "translation": 0}


def draw(model, seed):
    """Draws the weights by NumPy: the same under any backend, in any version of it."""
    random = np.random.default_rng(seed)
    for variable in model.trainable_variables:
        scale = 2.0 if variable.name == "gate_kernel" else 0.3
        variable.assign(random.normal(0, scale, variable.shape))


def language():
    """The demo's model and its schedule, of width 8 instead of 64, with 8 experts."""
    gating = NoisyTopKGating(8, 4, noise=False)
    model = LanguageModel(VOCABULARY, 8, SparseMoE(8, 16, gating=gating, name="moe"), **ALIKE)
    model.build((None, None))
    draw(model, SEEDS["language"])
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
    draw(model, SEEDS["translation"])
    model.compile(FactoredAdam(0.01))
    model.optimizer.build(model.trainable_variables)  # as weights are loaded with its slots
    source, y = next_words(batch=8)
    before = np.concatenate([np.full((8, 1), END), y[:, :-1]], axis=1)
    return model, (source, before), y


def go(model, x, y, steps):
    """The losses of some steps."""
    history = model.fit(x, y, batch_size=8, epochs=steps, shuffle=False, verbose=0).history
    return history["loss"]


def course(make, name, folder):
    """Goes the whole way and writes what it was halfway; returns the losses."""
    model, x, y = make()
    half = STEPS[name] // 2
    losses = go(model, x, y, half)
    if name == "language":
        model.save(folder / f"language.{keras.config.backend()}.keras")
    else:
        model.save_weights(folder / f"translation.{keras.config.backend()}.weights.h5")
    return losses + go(model, x, y, half)


def second_half(make, name, folder, of):
    """The losses of the second half, from the file that another backend has written."""
    model, x, y = make()
    if name == "language":
        model = keras.models.load_model(folder / f"language.{of}.keras")
    else:
        keras_moe.load_weights(model, folder / f"translation.{of}.weights.h5")
    return go(model, x, y, STEPS[name] // 2)


def translated(folder):
    """The hypotheses that a model halfway, as TensorFlow has it, finds for sources."""
    model = translation()[0]
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
        results[name] = course(make, name, folder)
        results[f"{name} of jax"] = second_half(make, name, folder, "jax")
    results["ids"] = translated(folder)
    np.savez(folder / "tensorflow.npz", **results)
