"""Compiles the training step of language models for TPUs that are not there; prints bytes per chip.

    python benchmarks/tpu_compile.py --presets MoE-256 MoE-1024-h --topologies v5e:4x4 v4:2x2x2

Each of R chips has N/R experts, as `expert_parallel=True` divides them, and the same number of
words. What libtpu says that the step takes of a chip's memory stands beside what formulas say.
"""

import argparse
import math
from typing import NamedTuple

import absent_tpu
import keras
import tensorflow as tf

from keras_moe.distribute import ExpertParallel
from keras_moe.models import LanguageModel, footprint
from keras_moe.models.presets import PRESETS, get_preset
from keras_moe.optimizers import FactoredAdam

OPTIMIZERS = {"FactoredAdam": FactoredAdam, "Adam": keras.optimizers.Adam}
FLOAT_BYTES = 4


class Step(NamedTuple):
    """A training step of one chip.

    Attributes:
        preset: A name in `PRESETS`.
        optimizer: A name in `OPTIMIZERS`.
        num_chips: R.
        num_sentences: Sentences for each chip.
        num_words: Words of a sentence.
        vocabulary_size: V.
        capacity_factor: Bounds the rows of each expert.
    """

    preset: str
    optimizer: str
    num_chips: int
    num_sentences: int
    num_words: int
    vocabulary_size: int
    capacity_factor: float


class Memory(NamedTuple):
    """Bytes of one chip.

    Attributes:
        arguments: What the step is given: weights, slots and words.
        outputs: What it returns beside weights and slots, which take the place of the old ones.
        temporaries: Gradients, activations and all else while it runs.
        code: The program; `None` where it has not been compiled.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int | None = None


def make_model(step):
    """The compiled model of a preset, its experts divided among the replicas."""
    preset = get_preset(step.preset)
    middle = preset.make_middle()
    changes = {"expert_parallel": True, "capacity_factor": step.capacity_factor}
    model = LanguageModel(
        step.vocabulary_size,
        preset.width,
        type(middle).from_config({**middle.get_config(), **changes}),
        lstm_units=preset.lstm_units,
        num_lstms=preset.num_lstms,
        dropout=preset.dropout,
        num_sampled=None,  # XLA has no sampler of words.
    )
    model.build((step.num_sentences, step.num_words))
    model.compile(ExpertParallel(OPTIMIZERS[step.optimizer]()), jit_compile=False)
    model.optimizer.build(model.trainable_variables)
    return model


def lower(step):
    """The step as a serialized module of XLA; see `absent_tpu`."""
    strategy = absent_tpu.make_strategy(step.num_chips, num_held=1)
    with absent_tpu.building(strategy):
        model = make_model(step)
    words = tf.TensorSpec([step.num_sentences, step.num_words], tf.int32)
    train = absent_tpu.of_one_chip(strategy, lambda *words: model.train_step(words))
    return absent_tpu.lower(train, words, words)


def measured(executable):
    """The `Memory` that the compiler reports."""
    stats = executable.get_compiled_memory_stats()
    return Memory(
        stats.argument_size_in_bytes,
        stats.output_size_in_bytes - stats.alias_size_in_bytes,
        stats.temp_size_in_bytes,
        stats.generated_code_size_in_bytes,
    )


def expected(step):
    """The `Memory` by formulas, in float32, without the room that a TPU's tiles leave empty.

    Temporaries are the gradients of all that a chip holds, and what the backward pass needs of the
    forward pass: of each word the logits, and of every LSTM its gates, its memory and what it was
    given; of each place at an expert the row, the hidden units and the result; and for the gatings
    of groups, which drop nothing, room for the rows of all chips.
    """
    preset = get_preset(step.preset)
    width, hidden, vocabulary_size = preset.width, preset.hidden_units, step.vocabulary_size
    per_expert = 2 * width * hidden
    slots_of_expert = 2 * (width + hidden) if step.optimizer == "FactoredAdam" else 2 * per_expert
    in_all = footprint(step.preset).parameters
    num_held = preset.num_experts // step.num_chips
    # Of a hierarchical gating the matrices of all groups together are divided as well.
    gatings = 0 if preset.num_groups is None else 2 * width * preset.num_experts
    divided = gatings // step.num_chips
    mirrored = in_all - preset.num_experts * per_expert - gatings
    mirrored += vocabulary_size * (2 * width + 1)

    words = step.num_sentences * step.num_words
    choices = words * math.prod(preset.k if isinstance(preset.k, tuple) else (preset.k,))
    units = preset.lstm_units or width
    activations = words * (vocabulary_size + preset.num_lstms * (5 * units + width))
    activations += math.ceil(step.capacity_factor * choices) * (2 * width + hidden)
    if preset.num_groups is not None:
        activations += step.num_chips * words * preset.k[0] * width
    held = num_held * per_expert + divided + mirrored
    slots = num_held * slots_of_expert + 2 * (divided + mirrored)
    return Memory(FLOAT_BYTES * (held + slots + 2 * words), 0, FLOAT_BYTES * (held + activations))


def heads():
    """The first two lines of a table of MiB per chip."""
    names = ["model", "TPU", "optimizer", "arguments", "formula", "temporaries", "formula"]
    names += ["outputs", "code"]
    return f"| {' | '.join(names)} |\n" + "|---" * len(names) + "|"


def row(names, got, formula):
    """Its line of three names, what the compiler reports and what formulas say."""
    numbers = [got.arguments, formula.arguments, got.temporaries, formula.temporaries]
    numbers += [got.outputs, got.code]
    return f"| {' | '.join([*names, *(f'{number / 2**20:.1f}' for number in numbers)])} |"


def main(arguments=None):
    """Compiles and prints; returns pairs of what the compiler reports and what formulas say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=["MoE-256", "MoE-1024-h"])
    parser.add_argument("--topologies", nargs="+", default=["v5e:4x4", "v4:2x2x2"])
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=["FactoredAdam"])
    parser.add_argument("--sentences", type=int, default=128, help="for each chip")
    parser.add_argument("--words", type=int, default=32, help="of a sentence")
    parser.add_argument("--vocabulary", type=int, default=20_000)
    parser.add_argument("--capacity-factor", type=float, default=1.25)
    options = parser.parse_args(arguments)

    print(heads(), flush=True)
    pairs = []
    for preset in options.presets:
        for name in options.topologies:
            topology = absent_tpu.make_topology(name)
            for optimizer in options.optimizers:
                step = Step(
                    preset,
                    optimizer,
                    len(topology.devices),
                    options.sentences,
                    options.words,
                    options.vocabulary,
                    options.capacity_factor,
                )
                executable = absent_tpu.compile_module(lower(step), topology)
                pairs.append((measured(executable), expected(step)))
                print(row((preset, name, optimizer), *pairs[-1]), flush=True)
                keras.backend.clear_session()
    return pairs


if __name__ == "__main__":
    main()
