"""Trains the paper's language model with the balance losses of Table 6, in small, side by side.

    python examples/balance.py                                # State of the Union addresses
    python examples/balance.py --text my_book.txt             # any UTF-8 text
    python examples/balance.py --dataset lm1b --width 512 --num-experts 256 --hidden-units 1024

Six mixture-of-experts models differ in w_importance and w_load alone, the weights of the importance
loss and of the load loss (equations 7 and 11): they begin with the same weights, see the same
batches, and draw the same noise, dropout and words for the softmax. The script prints their
perplexity on held-out text and the balance of their experts there, with and without the gating's
noise, beside the paper's figures, draws them, and says which of the paper's findings they show.
"""

import pathlib
import time

import batching
import experiment
import keras
import numpy as np
import report
import tensorflow as tf
import vocabulary
from experiment import SideBySide, evaluate, heading, read_words, train

import keras_moe
from keras_moe import losses

ROOT = pathlib.Path(__file__).parents[1]

# Table 6: MoE-256 on the 1-Billion-Word benchmark, by (w_importance, w_load).
COLUMNS = ("perplexity", *experiment.BALANCE)
PAPER = {
    setting: dict(zip(COLUMNS, figures, strict=True))
    for setting, figures in {
        (0.0, 0.0): (39.8, 3.04, 3.01, 17.80),
        (0.2, 0.0): (35.6, 0.06, 0.17, 1.47),
        (0.0, 0.2): (35.7, 0.22, 0.04, 1.15),
        (0.1, 0.1): (35.6, 0.06, 0.05, 1.14),
        (0.01, 0.01): (35.7, 0.48, 0.11, 1.37),
        (1.0, 1.0): (35.7, 0.03, 0.02, 1.07),
    }.items()
}


def parse_arguments(arguments=None):
    """Reads the command line."""
    options = (
        ("num-experts", 16, "experts of each model"),
        ("hidden-units", 64, "hidden units of an expert"),
        ("k", 2, "experts per word"),
        ("output", ROOT / "results" / "balance", "folder for the picture"),
    )
    return experiment.parse_arguments(
        __doc__,
        options,
        arguments,
        width=64,
        words_per_batch=16384,
        learning_rate=0.01,
        evaluations=4,
    )


def main(args):
    """Does all that the script does and returns the tables."""
    start = time.time()
    words, lookup = read_words(args)

    heading("Training side by side, on the same batches")
    print(f"Each model: {args.num_experts} experts of {args.hidden_units} units, {args.k} per word")
    names = {setting: "{:g}_{:g}".format(*setting) for setting in PAPER}
    models = {
        name: make_model(len(lookup.get_vocabulary()), *setting, name, args)
        for setting, name in names.items()
    }
    together = SideBySide(models)
    train(together, words, args, shown=["0_0", "0.1_0.1", "1_1"])

    heading("Whole held-out documents, routed without noise, as in use (and the paper's Table 6)")
    results = evaluate(together, words["test"], args)
    in_use = {setting: results[name] for setting, name in names.items()}
    print_rows(in_use)
    heading("The same, routed with noise, as in training: what the losses balance")
    results = noisy_balance(models, words["test"], args)
    in_training = {setting: results[name] for setting, name in names.items()}
    print_rows(in_training)
    args.output.mkdir(parents=True, exist_ok=True)
    tables = {"with noise": in_training, "without noise": in_use, "the paper": PAPER}
    print(f"wrote {report.plot_settings(tables, args.output / 'balance.png')}")

    heading("What the paper found, and whether these figures show it")
    print_findings(tables)
    print(f"\nAll of it took {(time.time() - start) / 60:.1f} minutes.")
    return tables


def make_model(vocabulary_size, w_importance, w_load, name, args):
    """Returns a built `LanguageModel`, equal to any other in all but the weights of its losses."""
    keras.utils.set_random_seed(args.seed)  # Each model draws its initial weights from the start.
    middle = keras_moe.SparseMoE(
        args.num_experts,
        args.hidden_units,
        args.k,
        importance_loss_weight=w_importance,
        load_loss_weight=w_load,
        seed=args.seed,
        name=name,
    )
    return experiment.make_model(vocabulary_size, middle, args)


def noisy_balance(models, sentences, args):
    """Returns the balance of each model's experts when noise takes part in the choice.

    Words per expert are counted, as `evaluate` counts them; there is no dropout.
    """
    columns = COLUMNS[1:]

    @tf.function(reduce_retracing=True)
    def measure(tokens):
        figures = []
        for model in models.values():
            moe = model.middle
            routing = moe.route(
                model.encode(tokens), training=True, mask=tokens != vocabulary.PADDING_ID
            )
            load = losses.hard_load(routing.gates, routing.expert_index, moe.num_experts)
            cvs = [tf.sqrt(losses.cv_squared(x)) for x in (routing.importance, load)]
            figures.append([*cvs, losses.max_over_mean(load)])
        return tf.stack(figures)

    batches = batching.batches(sentences, args.words_per_batch)
    figures = np.mean([measure(tokens) for tokens, _ in batches], axis=0)
    return {
        name: dict(zip(columns, row, strict=True))
        for name, row in zip(models, figures, strict=True)
    }


def print_rows(rows):
    """Prints a row per setting, the paper's figures in brackets."""
    columns = list(next(iter(rows.values())))
    print("w_importance  w_load", *(f"{column:>16}" for column in columns))
    for (w_importance, w_load), row in rows.items():
        paper = PAPER[w_importance, w_load]
        cells = (f"{row[column]:8.2f} ({paper[column]:5.2f})" for column in columns)
        print(f"{w_importance:12g}  {w_load:6g}", *cells)


def findings(rows):
    """Says which of the paper's findings rows of figures show.

    Args:
        rows: {(w_importance, w_load): {column: figure}} of the six settings.

    Returns:
        {finding: whether it shows}. Equal figures show no difference.
    """
    shows = {}
    for column in rows[0.0, 0.0]:
        others = max(row[column] for setting, row in rows.items() if setting != (0.0, 0.0))
        shows[f"without losses, {column} is the worst of all"] = rows[0.0, 0.0][column] > others
    for chain in (((0.2, 0.0), (0.1, 0.1), (0.0, 0.2)), ((0.01, 0.01), (0.1, 0.1), (1.0, 1.0))):
        steps = " to ".join("({:g}, {:g})".format(*setting) for setting in chain)
        first, second, third = (rows[setting]["max/mean load"] for setting in chain)
        shows[f"max/mean load falls from {steps}"] = first > second > third
    return shows


def print_findings(tables):
    """Prints a line per finding, and whether each of {name: rows} shows it."""
    shows = {name: findings(rows) for name, rows in tables.items()}
    print(*(name.rjust(13) for name in tables))
    for finding in findings(PAPER):
        words = {True: "yes", False: "no", None: "–"}  # None: perplexity is that without noise.
        print(*(words[found.get(finding)].rjust(13) for found in shows.values()), "", finding)


if __name__ == "__main__":
    experiment.run(main, parse_arguments)
