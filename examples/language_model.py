"""Trains the paper's language model in small, beside a dense twin of equal operations per word.

    python examples/language_model.py                         # State of the Union, about 8 minutes
    python examples/language_model.py --text my_book.txt      # any UTF-8 text
    python examples/language_model.py --dataset lm1b --num-experts 256 --width 512

Both models are embedding → LSTM → middle → LSTM → softmax, with a residual connection around each
layer and dropout on its output (appendix C). The middle of one is a mixture of experts, of which
every word uses k; that of its dense twin is a single expert, k times as wide, which every word uses
("MoE-1-Wide" in Table 7). The script compares their perplexity on held-out text, shows what some
experts have specialised in (Table 9), draws the curves, exports the mixture and queries the export
from another process.
"""

import argparse
import pathlib
import subprocess
import sys
import time

import keras
import numpy as np
import report
import serving
import tensorflow as tf
import text
from state_of_the_union import StateOfTheUnion
from word_model import WordModel, footprint

import keras_moe

ROOT = pathlib.Path(__file__).parents[1]


def parse_arguments(arguments=None):
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", metavar="FILE", help="a UTF-8 file to learn, lines of sentences")
    source.add_argument(
        "--dataset",
        metavar="NAME",
        default=StateOfTheUnion.name,
        help="a dataset of tensorflow-datasets (%(default)s)",
    )
    options = {
        "vocabulary_size": (6000, "words that the models know"),
        "width": (64, "units of the embedding and of every layer"),
        "num_experts": (64, "experts of the mixture"),
        "hidden_units": (128, "hidden units of an expert"),
        "k": (4, "experts per word"),
        "dropout": (0.1, "part of every layer's output to drop"),
        "words_per_batch": (4096, "positions per batch"),
        "epochs": (3, "passes over the training text"),
        "learning_rate": (0.008, "highest learning rate of Adam"),
        "num_sampled": (1024, "words that the training's sampled softmax draws"),
        "evaluations": (6, "points on the curves"),
        "seed": (0, "seed of the weights, the noise and the order of the batches"),
    }
    for name, (default, text_) in options.items():
        parser.add_argument(
            "--" + name.replace("_", "-"),
            type=type(default),
            default=default,
            help=f"{text_} ({default})",
        )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=ROOT / "results" / "language_model",
        help="folder for the pictures (results/language_model)",
    )
    parser.add_argument(
        "--export",
        type=pathlib.Path,
        default=ROOT / "saved_models" / "language_model" / "1",
        help="folder for the exported model (saved_models/language_model/1)",
    )
    return parser.parse_args(arguments)


def main(args):
    """Does all that the script does and returns the rows of the table."""
    start = time.time()
    heading(f"Reading {args.text or args.dataset}")
    splits = text.load_file(args.text) if args.text else text.load_dataset(args.dataset)
    lookup = text.build_vocabulary(splits["train"], args.vocabulary_size)
    words = {part: text.encode(sentences, lookup) for part, sentences in splits.items()}
    for part, sentences in words.items():
        ids = sentences.flat_values
        unknown = np.mean(ids == text.UNKNOWN_ID)
        print(f"{part:>10}: {sentences.nrows():9,} sentences, {len(ids):11,} words,", end=" ")
        print(f"{unknown:.1%} unknown")

    sizes = {
        "mixture": {
            "num_experts": args.num_experts,
            "hidden_units": args.hidden_units,
            "k": args.k,
        },
        "dense": {"num_experts": 1, "hidden_units": args.k * args.hidden_units, "k": 1},
    }
    models, histories, results = {}, {}, {}
    for name, size in sizes.items():
        heading(f"Training the {name} model: {size}")
        keras.utils.set_random_seed(args.seed)
        middle = keras_moe.SparseMoE(**size, seed=args.seed, name="moe")
        model = WordModel(args.vocabulary_size, args.width, middle, args.dropout, args.num_sampled)
        histories[name] = train(model, words, args)
        models[name] = model
        results[name] = evaluate(model, words["test"], args)
    mixture = models["mixture"]

    heading(
        "Held-out text: perplexity per word, end of sentence counted, over whole test documents"
    )
    report.print_table(results)
    heading("What the experts do: the words of the test text with the largest gates (Table 9)")
    contexts = report.ExpertContexts(mixture, words["test"], lookup)
    contexts.print_best(experts=3, contexts=6)
    args.output.mkdir(parents=True, exist_ok=True)
    for path in (
        report.plot_perplexity(histories, results, args.output / "perplexity.png"),
        report.plot_load(contexts.load, args.output / "expert_load.png"),
    ):
        print(f"wrote {path}")

    heading("Exporting the mixture, and asking it from a process without Keras")
    serving.export(mixture, lookup, args.export)
    prompts = text.decode(words["test"][:64:16, :6], lookup)
    expected = args.output / "expected.npz"
    tokens = serving.tokens(lookup, tf.constant(prompts))
    np.savez(expected, prompts=prompts, tokens=tokens, probabilities=np.exp(mixture(tokens)))
    subprocess.run(
        [sys.executable, ROOT / "examples" / "query.py", args.export, expected], check=True
    )
    print(f"\nAll of it took {(time.time() - start) / 60:.1f} minutes.")
    return results


def train(model, words, args):
    """Trains on batches that depend on the seed alone, and returns the history of `fit`."""
    batches = text.batches(words["train"], args.words_per_batch, seed=args.seed, epochs=args.epochs)
    steps = int(batches.cardinality())
    warm_up = min(200, steps // 10)
    learning_rate = keras.optimizers.schedules.CosineDecay(
        0.0, steps - warm_up, warmup_target=args.learning_rate, warmup_steps=warm_up
    )
    model.compile(keras.optimizers.Adam(learning_rate, global_clipnorm=1.0))
    history = model.fit(
        batches,
        epochs=args.evaluations,
        steps_per_epoch=steps // args.evaluations,
        validation_data=text.batches(words["validation"], args.words_per_batch),
        shuffle=False,  # The batches are shuffled.
        verbose=1 if sys.stdout.isatty() else 2,
    )
    history.steps = (np.array(history.epoch) + 1) * (steps // args.evaluations)
    return history


def evaluate(model, sentences, args):
    """Returns the row of the table that compares the models."""
    logs = model.evaluate(
        text.batches(sentences, args.words_per_batch), return_dict=True, verbose=0
    )
    operations, parameters = footprint(model)
    row = {"perplexity": logs["perplexity"], "ops/timestep": operations, "parameters": parameters}
    return {**row, **{key.removeprefix("moe/"): logs[key] for key in logs if "moe/" in key}}


def heading(title):
    """Prints a title at once, so that a newcomer sees what is going on."""
    print(f"\n=== {title}", flush=True)


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
