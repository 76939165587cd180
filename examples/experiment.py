"""What the language-model scripts share: command line, reading the text, training, evaluation."""

import argparse
import sys

import batching
import keras
import numpy as np
import report
from addresses import NAME as ADDRESSES
from keras import ops

from keras_moe import SparseMoE
from keras_moe.callbacks import Throughput
from keras_moe.models import LanguageModel, Perplexity, footprint
from keras_moe.optimizers import FactoredAdam, WarmupInverseSqrt

# With JAX nothing needs TensorFlow, whose reader has several threads.
if keras.config.backend() == "jax":
    import plain_text as text
    import plain_vocabulary as vocabulary
else:
    import text
    import vocabulary

# What every script has, with the defaults of the demo.
_COMMON = (
    ("vocabulary-size", 6000, "words that the models know"),
    ("width", 32, "units of the embedding and of every layer"),
    ("dropout", 0.1, "part of every layer's output to drop"),
    ("words-per-batch", 4096, "positions per batch"),
    ("epochs", 3, "passes over the training text"),
    ("optimizer", "adam", "adam, or factored_adam with little state for the experts"),
    ("learning-rate", 0.012, "highest learning rate"),
    ("schedule", "cosine", "of the learning rate after the warm-up: cosine or inverse_sqrt"),
    ("warm-up", 200, "steps in which the learning rate rises, at most a tenth of all"),
    ("num-sampled", 512, "words that the training's softmax draws per batch"),
    ("evaluations", 6, "evaluations on the validation text"),
    ("seed", 0, "seed of the weights, the noise and the batches"),
)
# What those of one mixture have in common beside that.
MIXTURE_OPTIONS = (
    ("num-experts", 64, "experts of the mixture"),
    ("hidden-units", 128, "hidden units of an expert"),
    ("k", 4, "experts per word"),
    ("balance-loss-weight", 0.01, "weight of the importance loss and of the load loss"),
)
# Of a mixture: columns of Table 6, and by what the logs call them.
BALANCE = {
    "CV(importance)": "cv_importance",
    "CV(load)": "cv_load",
    "max/mean load": "max_over_mean_load",
}
_CHOICES = {"optimizer": ("adam", "factored_adam"), "schedule": ("cosine", "inverse_sqrt")}


def parse_arguments(description, options, arguments=None, **defaults):
    """Reads the command line.

    Args:
        description: What `--help` begins with.
        options: Triples of name, default value and meaning, those that the script has of its own.
        arguments: List of strings. Default: those of the process.
        **defaults: Default values of the options that all scripts have, where others than the
            demo's.

    Returns:
        A namespace with `text` and `dataset`, where the words come from, and each of the options.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--text",
        metavar="FILE",
        nargs="+",
        help="UTF-8 files, a sentence or more on a line; beside NAME.train.txt, NAME.valid.txt and "
        "NAME.test.txt are held out; .gz, .bz2 and .xz are decompressed",
    )
    source.add_argument("--dataset", default=ADDRESSES, help="of tensorflow-datasets")
    add_options(
        parser,
        [
            (name, defaults.get(name.replace("-", "_"), default), meaning)
            for name, default, meaning in (*options, *_COMMON)
        ],
    )
    return parser.parse_args(arguments)


def add_options(parser, options):
    """Adds triples of name, default and meaning; where that is a list there can be several."""
    for name, default, meaning in options:
        parser.add_argument(
            f"--{name}",
            type=type(default[0] if isinstance(default, list) else default),
            nargs="+" if isinstance(default, list) else None,
            default=default,
            choices=_CHOICES.get(name),
            help=f"{meaning} (%(default)s)",
        )


def run(main, parse_arguments):
    """Runs a script; what its user can put right ends it in one sentence."""
    try:
        main(parse_arguments())
    except (ConnectionError, FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")


def heading(title):
    """Prints a title at once, so that a newcomer sees what is going on."""
    print(f"\n=== {title}", flush=True)


def read_words(args):
    """Reads the text that the command line names, and tells its size.

    Returns:
        The sentences as ids by part, and the lookup from words to ids; see
        `vocabulary.encode` and `vocabulary.build`.
    """
    heading(f"Reading {', '.join(args.text) if args.text else args.dataset}")
    splits = text.load_files(args.text) if args.text else text.load_dataset(args.dataset)
    lookup = vocabulary.build(splits["train"], args.vocabulary_size)
    words = {part: vocabulary.encode(sentences, lookup) for part, sentences in splits.items()}
    for part, sentences in words.items():
        ids = sentences.flat_values
        unknown = np.mean(ids == vocabulary.UNKNOWN_ID)
        print(f"{part:>10}: {sentences.nrows():9,} sentences, {len(ids):11,} words,", end=" ")
        print(f"{unknown:.1%} unknown")
    return words, lookup


def make_mixture(args, **options):
    """Returns the mixture that `MIXTURE_OPTIONS` describe.

    Args:
        args: What `parse_arguments` returns.
        **options: More keyword arguments of `SparseMoE`.
    """
    return SparseMoE(
        args.num_experts,
        args.hidden_units,
        args.k,
        importance_loss_weight=args.balance_loss_weight,
        load_loss_weight=args.balance_loss_weight,
        seed=args.seed,
        name="mixture",
        **options,
    )


def make_model(vocabulary_size, middle, args):
    """Returns a built `LanguageModel` around a layer, such as what `make_mixture` returns."""
    model = LanguageModel(
        vocabulary_size,
        args.width,
        middle,
        dropout=args.dropout,
        num_sampled=args.num_sampled,
        seed=args.seed,
    )
    model.build((None, None))
    return model


class SideBySide(keras.Model):
    """Trains several models on the same batches at the same time, each as if it were alone.

    Args:
        models: `LanguageModel`s or `TranslationModel`s by name. The logs show the perplexity of
            each under its name.
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
            # With JAX, where no shape depends on data, those of padding are there, too, and 0.
            words = None
            if keras.config.backend() == "jax":
                words = ops.cast(ops.reshape(y, (-1,)) != vocabulary.PADDING_ID, losses.dtype)
            self.perplexities[name].update_state(losses, words)
            number = ops.size(losses) if words is None else ops.maximum(ops.sum(words), 1)
            total += ops.sum(losses) / ops.cast(number, losses.dtype)
        return total


def train(side_by_side, words, args, shown=None):
    """Trains on batches that depend on the seed alone.

    Args:
        side_by_side: A `SideBySide`.
        words: The sentences of `read_words`.
        args: What `parse_arguments` returns.
        shown: Names of the models whose progress to print. Default: all.

    Returns:
        The history of `fit`, with the training step of each evaluation as `steps`.
    """
    batches = batching.batches(
        words["train"], args.words_per_batch, seed=args.seed, epochs=args.epochs
    )
    steps = len(batches)
    side_by_side.build((None, None))  # Else nothing is known of its operations.
    return fit(
        side_by_side,
        batches,
        batching.batches(words["validation"], args.words_per_batch),
        make_optimizer(args, steps),
        args.evaluations,
        [
            make_throughput(side_by_side, words["train"], args, steps),
            report.Progress(shown or list(side_by_side.models), steps),
        ],
    )


def fit(side_by_side, batches, validation, optimizer, evaluations, callbacks):
    """Trains on each batch once, and evaluates now and then.

    Args:
        side_by_side: A built `SideBySide`.
        batches: A dataset of the batches of all epochs.
        validation: A dataset of the batches of the validation part.
        optimizer: A Keras optimizer.
        evaluations: How often to evaluate.
        callbacks: List of Keras callbacks.

    Returns:
        The history of `fit`, with the training step of each evaluation as `steps`.
    """
    steps = len(batches)
    if steps < evaluations:
        raise ValueError(
            "The text must be long enough for a batch before each evaluation. Received: "
            f"{steps} batches for {evaluations} evaluations"
        )
    # Else TensorFlow traces the first step twice: once more when the variables are there.
    optimizer.build(side_by_side.trainable_variables)
    side_by_side.compile(optimizer)
    history = side_by_side.fit(
        batches,
        epochs=evaluations,
        steps_per_epoch=steps // evaluations,
        validation_data=validation,
        shuffle=False,  # The batches are shuffled.
        callbacks=callbacks,
        verbose=0,
    )
    history.steps = (np.array(history.epoch) + 1) * (steps // evaluations)
    return history


def make_optimizer(args, steps):
    """Returns the optimizer that the command line names, with its schedule."""
    warm_up = min(args.warm_up, steps // 10)
    if args.schedule == "cosine":
        learning_rate = keras.optimizers.schedules.CosineDecay(
            0.0, steps - warm_up, warmup_target=args.learning_rate, warmup_steps=warm_up
        )
    else:
        learning_rate = WarmupInverseSqrt(args.learning_rate, max(warm_up, 1))
    optimizers = {"adam": keras.optimizers.Adam, "factored_adam": FactoredAdam}
    return optimizers[args.optimizer](learning_rate)


def make_throughput(side_by_side, sentences, args, steps):
    """Returns the callback that logs words per second and TFLOPS, of all the models together."""
    words = args.epochs * (sentences.flat_values.shape[0] + sentences.nrows())  # and their ends
    models = side_by_side.models.values()
    # Each word is compared with those drawn and with the target.
    softmax = sum(model.width * (model.softmax.num_sampled + 1) for model in models)
    return Throughput(
        sum(footprint(model).ops_per_timestep for model in models),
        words_per_step=int(words) / steps,
        softmax_ops_per_timestep=softmax,
    )


def evaluate(side_by_side, sentences, args):
    """Returns each model's perplexity and, the mean of the batches, the balance of its experts.

    The columns are those of Table 6; a model without a `SparseMoE` of its own name has `None` for
    the balance.
    """
    batches = batching.batches(sentences, args.words_per_batch)
    logs = side_by_side.evaluate(batches, return_dict=True, verbose=0)
    return {
        name: {"perplexity": logs[f"{name}/perplexity"], **balance(name, logs)}
        for name in side_by_side.models
    }


def balance(name, logs):
    """Returns the balance of a mixture's experts in the logs of `fit` or `evaluate`."""
    return {column: logs.get(f"{name}/{metric}") for column, metric in BALANCE.items()}
