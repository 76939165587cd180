"""Trains models of equal operations per word, with more and more parameters: Figure 2, left.

    python examples/capacity.py                                  # State of the Union addresses
    python examples/capacity.py --text english.train.txt.xz      # and .valid. and .test. beside it
    python examples/capacity.py --models MoE-4 MoE-256-h --seed 1     # some, with another seed

Mixtures of 4 to 256 experts, flat and hierarchical, and the three baselines of Table 7 without a
mixture train on the same batches, one after the other. All are as wide, and their hidden units are
as many as make the operations per word equal, those of the gating included; the LSTMs of the third
baseline are as many. Each finished model leaves a file in the output folder, and the script trains
only what has none, so that it goes on where it was interrupted, and several processes can share the
work by `--models` and `--seed`. It ends with the table and the picture of all that is there.
"""

import dataclasses
import json
import math
import pathlib
import time

import experiment
import keras
import numpy as np
import report
from experiment import SideBySide, evaluate, heading, read_words, train

from keras_moe.models import LanguageModel, Preset, footprint

ROOT = pathlib.Path(__file__).parents[1]

_FLAT = {f"MoE-{n}": {"num_experts": n} for n in (4, 16, 64, 256)}
_HIERARCHICAL = {  # As many groups as experts in a group.
    f"MoE-{n}-h": {"num_experts": n, "num_groups": math.isqrt(n), "k": (2, 2)}
    for n in (4, 16, 64, 256)
}
_DENSE = {
    "MoE-1-Wide": {"num_experts": 1},
    "MoE-1-Deep": {"num_experts": 1, "hidden_units": (1,) * 4},
    "LSTMs": {"num_experts": 0},
}
MODELS = {**_DENSE, **_FLAT, **_HIERARCHICAL}
# What decides a result, as the evaluations do by the steps that are left over; runs are compared
# only where all of it is equal.
_SETTINGS = (
    "text dataset vocabulary_size width hidden_units balance_loss_weight dropout words_per_batch "
    "epochs evaluations optimizer learning_rate schedule warm_up num_sampled"
).split()


def parse_arguments(arguments=None):
    """Reads the command line."""
    options = (
        ("hidden-units", 32, "hidden units of an expert of MoE-256, the one with most gating"),
        ("balance-loss-weight", 0.01, "weight of the importance loss and of the load loss"),
        ("models", list(MODELS), f"of {', '.join(MODELS)}"),
        ("output", ROOT / "results" / "capacity", "folder for the results and the picture"),
    )
    args = experiment.parse_arguments(
        __doc__,
        options,
        arguments,
        vocabulary_size=10_000,
        dropout=0.0,
        words_per_batch=8192,
        epochs=4,
        learning_rate=0.01,
    )
    unknown = [name for name in args.models if name not in MODELS]
    if unknown:
        raise ValueError(f"The models must be of {', '.join(MODELS)}. Received: {unknown}")
    return args


def main(args):
    """Does all that the script does and returns the rows of the table."""
    settings = {name: getattr(args, name) for name in _SETTINGS}
    args.output.mkdir(parents=True, exist_ok=True)
    load_runs(args.output, settings)  # Now, not after hours of training.
    missing = [name for name in args.models if not result_path(args, name).exists()]
    if missing:
        words, lookup = read_words(args)
        presets = make_presets(args)
        for name in missing:
            heading(f"Training {name}, seed {args.seed}")
            result = run(name, presets[name], words, len(lookup.get_vocabulary()), args)
            save(result_path(args, name), {"settings": settings, **result})

    heading("Perplexity on the test text, end of sentence counted")
    rows = summarise(load_runs(args.output, settings))
    report.print_table(rows)
    print(f"wrote {report.plot_capacity(rows, args.output / 'capacity.png')}")
    return rows


def make_presets(args):
    """Returns the `Preset` of each model, as near as whole units come to equal operations."""
    common = {
        "width": args.width,
        "importance_loss_weight": args.balance_loss_weight,
        "load_loss_weight": args.balance_loss_weight,
        "dropout": args.dropout,
    }
    largest = Preset(**common, hidden_units=args.hidden_units, num_experts=256)
    budget = footprint(largest).ops_per_timestep
    return {name: fit(Preset(**{**common, **options}), budget) for name, options in MODELS.items()}


def fit(preset, budget):
    """Gives a preset as many hidden units, or LSTMs if it has no experts, as the budget pays for.

    Args:
        preset: A `Preset`.
        budget: Operations per word.

    Raises:
        ValueError: If the budget is too small for one unit.
    """

    def sized(size):
        if preset.num_experts == 0:
            return dataclasses.replace(preset, num_lstms=size)
        several = isinstance(preset.hidden_units, tuple)
        units = (size,) * len(preset.hidden_units) if several else size
        return dataclasses.replace(preset, hidden_units=units)

    def pays_for(size):
        return footprint(sized(size)).ops_per_timestep <= budget

    if not pays_for(1):
        raise ValueError(
            f"One unit takes more than the operations of the budget. Received: {budget}"
        )
    low, high = 1, 2
    while pays_for(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if pays_for(middle) else (low, middle)
    return sized(low)


def run(name, preset, words, vocabulary_size, args):
    """Trains and evaluates one model and returns what there is to know of it."""
    keras.utils.set_random_seed(args.seed)
    model = LanguageModel.from_preset(
        preset, vocabulary_size, name=name, num_sampled=args.num_sampled, seed=args.seed
    )
    alone = SideBySide({name: model})
    start = time.time()
    history = train(alone, words, args)
    minutes = (time.time() - start) / 60
    figures = evaluate(alone, words["test"], args)[name]
    operations, parameters = footprint(model)
    return {
        "model": name,
        "seed": args.seed,
        "ops/timestep": operations,
        "parameters": parameters,
        **figures,
        "steps": int(history.steps[-1]),
        "minutes": minutes,
        "words/s": float(np.median(history.history["words_per_second"])),
        "validation": history.history[f"val_{name}/perplexity"],
    }


def result_path(args, name):
    """The file of a model's result."""
    return args.output / f"{name}-seed{args.seed}.json"


def save(path, result):
    """Writes a result, completely or not at all."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(result, indent=2) + "\n")
    unfinished.replace(path)


def load_runs(folder, settings):
    """Returns the results in a folder, all of the same settings.

    Raises:
        ValueError: If one has others.
    """
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("*-seed*.json"))]
    for result in runs:
        check_settings(folder, result["model"], result.pop("settings"), settings)
    return runs


def check_settings(folder, model, theirs, settings):
    """Raises ValueError if a result in a folder has other settings than those of now."""
    other = [name for name in settings if theirs[name] != settings[name]]
    if other:
        raise ValueError(
            f"The results in {folder} must be of the same settings to be compared; another "
            f"--output keeps them apart. Received: {model} with "
            + ", ".join(f"{name}={theirs[name]!r}, now {settings[name]!r}" for name in other)
        )


def summarise(runs):
    """Returns the rows of the table in the order of `MODELS`, each the mean of its seeds.

    "below, %" is how far a perplexity lies below the best one of a model without a mixture, the
    same seeds taken of both.
    """
    by_model = {
        name: {run["seed"]: run for run in runs if run["model"] == name}
        for name in MODELS
        if any(run["model"] == name for run in runs)
    }
    rows = {}
    for name, mine in by_model.items():
        below = [
            100 * (1 - np.mean([mine[s]["perplexity"] / theirs[s]["perplexity"] for s in seeds]))
            for dense, theirs in by_model.items()
            if dense in _DENSE and (seeds := set(mine) & set(theirs))
        ]
        perplexities = [run["perplexity"] for run in mine.values()]
        first = next(iter(mine.values()))
        rows[name] = {
            "perplexity": float(np.mean(perplexities)),
            "lowest": min(perplexities),
            "highest": max(perplexities),
            "seeds": len(mine),
            "below, %": float(min(below)) if below and name not in _DENSE else None,
            **{key: first[key] for key in ("ops/timestep", "parameters", "steps")},
            "max/mean load": first["max/mean load"],
            "minutes": float(np.median([run["minutes"] for run in mine.values()])),
            "words/s": int(np.median([run["words/s"] for run in mine.values()])),
        }
    return rows


if __name__ == "__main__":
    experiment.run(main, parse_arguments)
