"""What the language-model scripts share: command line, reading the text, training, evaluation."""

import argparse
import sys

import keras
import numpy as np
import report
import tensorflow as tf
import text
from state_of_the_union import StateOfTheUnion

from keras_moe.models import Perplexity


def parse_arguments(description, options, arguments=None):
    """Reads the command line.

    Args:
        description: What `--help` begins with.
        options: Triples of name, default value and meaning.
        arguments: List of strings. Default: those of the process.

    Returns:
        A namespace with `text` and `dataset`, where the words come from, and each of the options.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", metavar="FILE", help="UTF-8 file, a sentence or more on a line")
    source.add_argument("--dataset", default=StateOfTheUnion.name, help="of tensorflow-datasets")
    for name, default, meaning in options:
        parser.add_argument(
            f"--{name}", type=type(default), default=default, help=f"{meaning} (%(default)s)"
        )
    return parser.parse_args(arguments)


def run(main, args):
    """Runs a script; what its user can put right ends it in one sentence."""
    try:
        main(args)
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")


def heading(title):
    """Prints a title at once, so that a newcomer sees what is going on."""
    print(f"\n=== {title}", flush=True)


def read_words(args):
    """Reads the text that the command line names, and tells its size.

    Returns:
        The sentences as ids by part, and the lookup from words to ids; see `text.encode` and
        `text.build_vocabulary`.
    """
    heading(f"Reading {args.text or args.dataset}")
    splits = text.load_file(args.text) if args.text else text.load_dataset(args.dataset)
    lookup = text.build_vocabulary(splits["train"], args.vocabulary_size)
    words = {part: text.encode(sentences, lookup) for part, sentences in splits.items()}
    for part, sentences in words.items():
        ids = sentences.flat_values
        unknown = np.mean(ids == text.UNKNOWN_ID)
        print(f"{part:>10}: {sentences.nrows():9,} sentences, {len(ids):11,} words,", end=" ")
        print(f"{unknown:.1%} unknown")
    return words, lookup


class SideBySide(keras.Model):
    """Trains several models on the same batches at the same time, each as if it were alone.

    Args:
        models: `LanguageModel`s by name. The logs show the perplexity of each under its name.
    """

    def __init__(self, models):
        super().__init__()
        self.models = models
        self.perplexities = {name: Perplexity(name=f"{name}/perplexity") for name in models}

    def build(self, tokens_shape):
        """Builds the models that aren't built yet."""
        for model in self.models.values():
            if not model.built:
                model.build(tokens_shape)

    def call(self, tokens, training=None):
        """The models' outputs by name."""
        return {name: model(tokens, training=training) for name, model in self.models.items()}

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Mean cross-entropy per word of each model and the losses of its layers, added up."""
        total = sum(self.losses)
        for name, model in self.models.items():
            losses = model.cross_entropy(y, y_pred[name], training)
            self.perplexities[name].update_state(losses)
            total += tf.reduce_mean(losses)
        return total


def train(side_by_side, words, args, shown=None):
    """Trains on batches that depend on the seed alone.

    Args:
        side_by_side: A `SideBySide`.
        words: The sentences of `read_words`.
        args: The command line's `words_per_batch`, `seed`, `epochs`, `learning_rate` and
            `evaluations`.
        shown: Names of the models whose progress to print, one with a `SparseMoE` first.
            Default: all.

    Returns:
        The history of `fit`, with the training step of each evaluation as `steps`.
    """
    batches = text.batches(words["train"], args.words_per_batch, seed=args.seed, epochs=args.epochs)
    steps = len(batches)
    if steps < args.evaluations:
        raise ValueError(
            "The text must be long enough for a batch before each evaluation. Received: "
            f"{steps} batches for {args.evaluations} evaluations"
        )
    warm_up = min(200, steps // 10)
    learning_rate = keras.optimizers.schedules.CosineDecay(
        0.0, steps - warm_up, warmup_target=args.learning_rate, warmup_steps=warm_up
    )
    side_by_side.compile(keras.optimizers.Adam(learning_rate))
    history = side_by_side.fit(
        batches,
        epochs=args.evaluations,
        steps_per_epoch=steps // args.evaluations,
        validation_data=text.batches(words["validation"], args.words_per_batch),
        shuffle=False,  # The batches are shuffled.
        callbacks=[report.Progress(shown or list(side_by_side.models), steps)],
        verbose=0,
    )
    history.steps = (np.array(history.epoch) + 1) * (steps // args.evaluations)
    return history


def evaluate(side_by_side, sentences, args):
    """Returns each model's perplexity and, the mean of the batches, the balance of its experts.

    The columns are those of Table 6; a model without a `SparseMoE` of its own name has `None` for
    the balance.
    """
    batches = text.batches(sentences, args.words_per_batch)
    logs = side_by_side.evaluate(batches, return_dict=True, verbose=0)
    return {
        name: {
            "perplexity": logs[f"{name}/perplexity"],
            "CV(importance)": logs.get(f"{name}/cv_importance"),
            "CV(load)": logs.get(f"{name}/cv_load"),
            "max/mean load": logs.get(f"{name}/max_over_mean_load"),
        }
        for name in side_by_side.models
    }
