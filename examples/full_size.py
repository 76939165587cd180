"""Trains models of Figure 2, left, in the paper's size, the learning rate of each searched.

    python examples/full_size.py --text english.train.txt.xz      # and .valid. and .test. beside it
    python examples/full_size.py --text english.train.txt.xz --cache words.npz --models MoE-256

The models are rows of Table 7, of some 8.4 million operations per word, or all sizes scaled to
another `--width`. They see the same batches in the same order; rows are 64 words of sentences one
behind the other, in evaluations as well. Each model is trained with several learning rates up to
the same step, and goes on with that of the lowest validation perplexity there, until the epochs
end or validation perplexity no longer falls.

Each evaluation adds a line to the model's file in the output folder, so that what is interrupted is
worth keeping, and several processes can share the work by `--models`; a model that has a file is
not trained again. The script ends with the table and the pictures of all that is there, at the last
step that every model has reached.
"""

import argparse
import dataclasses
import gc
import json
import math
import pathlib
import time

import batching
import experiment
import keras
import report
import word_stream
from capacity import check_settings
from experiment import SideBySide, heading

from keras_moe.models import LanguageModel, footprint
from keras_moe.models.presets import TABLE_7

ROOT = pathlib.Path(__file__).parents[1]

_DENSE = ("4xLSTM-512", "MoE-1-Wide")
MODELS = (*_DENSE, "MoE-4", "MoE-32", "MoE-256", "MoE-1024-h")
# Curves are compared only where all of it is equal.
_SETTINGS = (
    "vocabulary_size width dropout balance_loss_weights words_per_batch epochs evaluations "
    "searched held_out optimizer learning_rate factors schedule warm_up num_sampled seed"
).split()


def parse_arguments(arguments=None):
    """Reads the command line."""
    options = (
        ("models", list(MODELS), f"of {', '.join(MODELS)}"),
        ("factors", [1.0, 2.0, 0.5], "of the learning rate, tried one after the other"),
        ("searched", 5, "evaluations after which the best learning rate goes on alone"),
        ("patience", 10, "evaluations without a lower validation perplexity that end the training"),
        ("held-out", 2000, "sentences of each held-out text that an evaluation sees"),
        ("balance-loss-weights", [0.01, 0.01], "w_importance and w_load, as in Table 6"),
        ("cache", "", "file of the words as ids: read if it is there, else written"),
        ("output", ROOT / "results" / "full_size", "folder for the curves and the pictures"),
    )
    args = experiment.parse_arguments(
        __doc__,
        options,
        arguments,
        width=512,
        vocabulary_size=32_000,
        words_per_batch=16_384,
        learning_rate=0.002,
        schedule="inverse_sqrt",
        warm_up=100,
        num_sampled=2048,
        epochs=4,
        evaluations=65,
    )
    unknown = [name for name in args.models if name not in MODELS]
    if unknown:
        raise ValueError(f"The models must be of {', '.join(MODELS)}. Received: {unknown}")
    if len(args.balance_loss_weights) != 2:
        raise ValueError(
            "--balance-loss-weights must be two numbers, w_importance and w_load. Received: "
            f"{args.balance_loss_weights}"
        )
    if not 1 <= args.searched <= args.evaluations:
        raise ValueError(
            "--searched must be at least 1 and at most the number of evaluations. Received: "
            f"{args.searched} of {args.evaluations}"
        )
    return args


def main(args):
    """Does all that the script does and returns the rows of the table."""
    args.output.mkdir(parents=True, exist_ok=True)
    load_curves(args)  # Now, not after hours of training.
    missing = [name for name in args.models if not curve_path(args, name).exists()]
    if missing:
        words = word_stream.read(args)
        for name in missing:
            heading(f"Training {name}")
            search_and_train(name, words, args)

    curves = {name: choose(lines) for name, lines in load_curves(args).items()}
    rows = summarise(curves)
    heading("Perplexity on held-out text, end of sentence counted")
    report.print_table(rows)
    print(f"wrote {report.plot_capacity(rows, args.output / 'capacity.png')}")
    print(f"wrote {report.plot_curves(curves, args.output / 'curves.png')}")
    return rows


def make_preset(name, args):
    """Returns the row of Table 7, scaled, with the dropout and the losses that all models have."""
    w_importance, w_load = args.balance_loss_weights
    return dataclasses.replace(
        TABLE_7[name].scaled(args.width),
        dropout=args.dropout,
        importance_loss_weight=w_importance,
        load_loss_weight=w_load,
    )


def search_and_train(name, words, args):
    """Trains a model with each learning rate for a while, and with the best one to the end."""
    train = word_stream.as_stream(words["train"])
    batches = batching.batches(train, args.words_per_batch, seed=args.seed, epochs=args.epochs)
    held_out = {
        part: word_stream.as_stream(words[part][: args.held_out]) for part in ("validation", "test")
    }
    best = None
    for factor in args.factors:
        course = Course(name, factor * args.learning_rate, len(batches), held_out, args)
        course.train(batches, 0, args.searched)
        if best is None or course.lowest < best.lowest:
            best = course
        del course
        gc.collect()  # Models are cycles, which would keep the memory of the device.
    best.train(batches, args.searched, args.evaluations)


class Course(keras.callbacks.Callback):
    """The training of one model with one learning rate; each evaluation is a line of a file.

    Args:
        name: One of `MODELS`.
        learning_rate: The highest.
        steps: Steps of all epochs.
        held_out: {part: sentences} to evaluate.
        args: What `parse_arguments` returns.

    Attributes:
        lowest: The lowest validation perplexity so far.
    """

    def __init__(self, name, learning_rate, steps, held_out, args):
        super().__init__()
        self.held_out, self.args = held_out, args
        self.interval = steps // args.evaluations
        self.lowest, self.evaluations_since, self.start = math.inf, 0, time.time()
        keras.utils.set_random_seed(args.seed)
        options = {"name": name, "num_sampled": args.num_sampled, "seed": args.seed}
        model = LanguageModel.from_preset(make_preset(name, args), args.vocabulary_size, **options)
        self.alone = SideBySide({name: model})
        self.alone.build((None, None))
        operations, parameters = footprint(model)
        self.facts = {
            "model": name,
            "ops/timestep": operations,
            "parameters": parameters,
            "learning rate": learning_rate,
            "settings": {key: getattr(args, key) for key in _SETTINGS},
        }
        options = argparse.Namespace(**{**vars(args), "learning_rate": learning_rate})
        optimizer = experiment.make_optimizer(options, steps)
        optimizer.build(self.alone.trainable_variables)
        self.alone.compile(optimizer)

    def train(self, batches, first, last):
        """Trains from one evaluation to another."""
        self.alone.fit(
            batches.skip(first * self.interval),
            initial_epoch=first,
            epochs=last,
            steps_per_epoch=self.interval,
            shuffle=False,  # The batches are shuffled.
            callbacks=[self],
            verbose=0,
        )

    def on_epoch_end(self, epoch, logs=None):
        name = self.facts["model"]
        found = {
            part: experiment.evaluate(self.alone, sentences, self.args)[name]
            for part, sentences in self.held_out.items()
        }
        line = {
            **self.facts,
            "step": (epoch + 1) * self.interval,
            "training": logs[f"{name}/perplexity"],
            **{part: row["perplexity"] for part, row in found.items()},
            "balance": {column: found["test"][column] for column in experiment.BALANCE},
            "balance with noise": experiment.balance(name, logs),
            "seconds": time.time() - self.start,
        }
        with curve_path(self.args, name).open("a") as file:
            file.write(json.dumps(line) + "\n")
        print("{step:6,} steps at {learning rate:g}: {validation:8.2f}".format(**line), flush=True)
        self.evaluations_since += 1
        if validation(line) < self.lowest:
            self.lowest, self.evaluations_since = line["validation"], 0
        if self.evaluations_since >= self.args.patience:
            self.alone.stop_training = True


def curve_path(args, name):
    """The file of a model's evaluations, a line each."""
    return args.output / f"{name}.jsonl"


def load_curves(args):
    """Returns the evaluations of each model that has a file, in the order of `MODELS`.

    Raises:
        ValueError: If one has other settings than the command line names.
    """
    curves = {}
    for name in MODELS:
        path = curve_path(args, name)
        lines = path.read_text().splitlines() if path.exists() else []
        if not lines:
            continue
        curves[name] = [json.loads(line) for line in lines]
        mine = {key: getattr(args, key) for key in _SETTINGS}
        check_settings(args.output, name, curves[name][0]["settings"], mine)
    return curves


def summarise(curves):
    """Returns the rows of the table, all at the last step that every model has reached.

    "below, %" is how far a test perplexity lies below the best one of a model without a mixture,
    and "best" the one at the model's lowest validation perplexity, however late that was. The
    balance is that of the test text, and "with noise" the max/mean load of training.
    """
    step = min(lines[-1]["step"] for lines in curves.values())
    at_step = {
        name: next(line for line in lines if line["step"] == step) for name, lines in curves.items()
    }
    dense = [line["test"] for name, line in at_step.items() if name in _DENSE]
    rows = {}
    for name, line in at_step.items():
        stopped = min(curves[name], key=validation)
        below = 100 * (1 - line["test"] / min(dense)) if dense and name not in _DENSE else None
        rows[name] = {
            "perplexity": line["test"],
            "below, %": below,
            **{key: line[key] for key in ("step", "ops/timestep", "parameters")},
            **line["balance"],
            "with noise": line["balance with noise"]["max/mean load"],
            "1000 * rate": 1000 * line["learning rate"],
            "best": stopped["test"],
            "at step": stopped["step"],
        }
    return rows


def choose(lines):
    """Returns the lines of the learning rate that the search found, of those it has come to."""
    by_rate = {}
    for line in lines:
        by_rate.setdefault(line["learning rate"], []).append(line)
    searched = lines[0]["settings"]["searched"]
    tried = [course for course in by_rate.values() if len(course) >= searched]
    if not tried:
        return next(iter(by_rate.values()))
    return min(tried, key=lambda course: min(map(validation, course[:searched])))


def validation(line):
    """The validation perplexity of an evaluation, infinite where the training fell apart."""
    return line["validation"] if math.isfinite(line["validation"]) else math.inf


if __name__ == "__main__":
    experiment.run(main, parse_arguments)
