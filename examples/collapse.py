"""Looks into the noisy top-k gating of small models as they learn: who chooses, words or noise?

    python examples/collapse.py                                   # messages of Django
    python examples/collapse.py --data en-fr.train.tsv.xz         # any pairs of sentences
    python examples/collapse.py --models translation --settings paper weights_0.1 --seed 1

A translation model has a mixture in its encoder and one in its decoder; a language model of the
translations alone has one. Each trains once for each of `--settings`, on the same batches. Now and
then the script shows for each mixture the load of the fullest expert over the mean, with noise as
in training and without as in use, and what lies behind it:

- how much of the gating's input is common to all words: |mean of x|² over the mean of |x|²;
- x·W_g in three parts: what it adds to each expert for all words alike (offset), how words differ
  from that (spread), and the noise, each as a standard deviation;
- how often an expert that noise chose would be chosen without it (kept), by chance K/N;
- the gradients that reach W_g from the cross-entropy and from the balance losses, and how much of
  them points along that common part.

It writes all figures as JSON and draws the loads.
"""

import argparse
import json
import pathlib
import time

import experiment
import keras
import pair_batching
import report
import tensorflow as tf
import translation
from django_catalogs import DjangoCatalogs
from experiment import heading
from normalized_gating import NormalizedGating

import keras_moe
from keras_moe import NoisyTopKGating, losses
from keras_moe.models import LanguageModel, TranslationModel
from keras_moe.optimizers import WarmupInverseSqrt

ROOT = pathlib.Path(__file__).parents[1]
COLUMNS = ("load, noisy", "load", "kept", "common", "offset", "spread", "noise")


def parse_arguments(arguments=None):
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options = (
        ("models", ["translation", "language"], "of translation, language"),
        ("settings", list(SETTINGS), f"of {', '.join(SETTINGS)}"),
        ("vocabulary-size", 1500, "word pieces that the models know"),
        ("width", 64, "units of the embeddings and of every layer"),
        ("lstm-units", 64, "units of each LSTM; the paper's are 4 times the width"),
        ("num-experts", 32, "experts of each mixture"),
        ("hidden-units", 128, "hidden units of an expert"),
        ("k", 2, "experts per word"),
        ("dropout", 0.1, "part of every layer's output to drop"),
        ("words-per-batch", 1024, "positions per batch, of a pair those of its longer side"),
        ("max-length", 24, "the longest sides of a training pair, in word pieces"),
        ("steps", 200, "training steps of each model, at most one pass"),
        ("learning-rate", 0.004, "highest learning rate of Adam, after the warm-up"),
        ("warm-up", 100, "steps in which the learning rate rises"),
        ("evaluations", 2, "times to look"),
        ("seed", 0, "seed of the weights, the noise and the batches"),
        ("output", ROOT / "results" / "collapse", "folder for the figures and the picture"),
    )
    parser.add_argument(
        "--data", metavar="FILE", nargs="+", help="pairs of sentences, as for translation.py"
    )
    experiment.add_options(parser, options)
    args = parser.parse_args(arguments)
    args.dataset, args.pairs = DjangoCatalogs.name, ["en-fr"]  # Without files.
    for chosen, known in ((args.models, MODELS), (args.settings, SETTINGS)):
        unknown = [name for name in chosen if name not in known]
        if unknown:
            raise ValueError(f"Known are {', '.join(known)}. Received: {unknown}")
    return args


class Watched:
    """A gating that keeps what its kernels last met."""

    def examples(self, x, mask):
        self.seen = super().examples(x, mask)
        return self.seen


class WatchedGating(Watched, NoisyTopKGating):
    """Noisy top-k gating, watched."""


class WatchedNormalizedGating(Watched, NormalizedGating):
    """The same without what all words have in common."""


# The gating, and the weight of both balance losses: 0.01 in the paper's translation models.
SETTINGS = {
    "paper": (WatchedGating, 0.01),
    "weights_0.1": (WatchedGating, 0.1),
    "normalized": (WatchedNormalizedGating, 0.01),
    "both": (WatchedNormalizedGating, 0.1),
}


def make_mixture(name, setting, seed, args):
    """Returns a mixture of experts whose gating is watched."""
    gating, weight = setting
    return keras_moe.SparseMoE(
        args.num_experts,
        args.hidden_units,
        gating=gating(args.num_experts, args.k, seed=seed),
        importance_loss_weight=weight,
        load_loss_weight=weight,
        name=name,
    )


def make_translation_model(vocabulary_size, setting, args):
    """Returns a `TranslationModel`, in small but for the number of its layers."""
    return TranslationModel(
        vocabulary_size,
        args.width,
        make_mixture("encoder", setting, args.seed, args),
        make_mixture("decoder", setting, args.seed + 1, args),
        lstm_units=args.lstm_units,
        dropout=args.dropout,
        seed=args.seed,
    )


def make_language_model(vocabulary_size, setting, args):
    """Returns a `LanguageModel`."""
    middle = make_mixture("middle", setting, args.seed, args)
    return LanguageModel(vocabulary_size, args.width, middle, dropout=args.dropout, seed=args.seed)


MODELS = {"translation": make_translation_model, "language": make_language_model}


def main(args):
    """Does all that the script does and returns the rows by model, setting and mixture."""
    start = time.time()
    data, pieces = translation.read_pairs(args)
    pairs = {
        part: pair_batching.together([parts[part] for parts in data.values()]).up_to(
            args.max_length
        )
        for part in ("train", "validation")
    }
    args.output.mkdir(parents=True, exist_ok=True)
    found = {}
    for kind in args.models:
        for setting in args.settings:
            heading(f"{kind}, {setting}")
            found[f"{kind}, {setting}"] = run(kind, setting, pieces.size, pairs, args)
            path = args.output / "collapse.json"
            path.write_text(json.dumps({"arguments": vars(args), "found": found}, default=str))
    print(f"wrote {path} and {report.plot_collapse(found, args.output / 'collapse.png')}")
    print(f"\nAll of it took {(time.time() - start) / 60:.1f} minutes.")
    return found


def run(kind, setting, vocabulary_size, pairs, args):
    """Trains one model; returns the rows of each of its mixtures, one for each look."""
    keras.utils.set_random_seed(args.seed)
    model = MODELS[kind](vocabulary_size, SETTINGS[setting], args)
    model.build((None, None))
    model.compile(
        keras.optimizers.Adam(WarmupInverseSqrt(args.learning_rate, args.warm_up, args.steps))
    )
    train, validation = (batches(pairs[part], kind, args) for part in ("train", "validation"))
    steps = min(args.steps, len(train))
    batch = max(validation, key=lambda batch: int(tf.math.count_nonzero(batch[1])))
    watch = Watch(batch, steps // args.evaluations)
    model.fit(
        train.take(steps),
        epochs=args.evaluations,
        steps_per_epoch=steps // args.evaluations,
        validation_data=validation,
        shuffle=False,
        callbacks=[watch],
        verbose=0,
    )
    return watch.rows


def batches(pairs, kind, args):
    """Batches of pairs, or for a language model of the translations alone, shuffled."""
    dataset = pair_batching.batches(
        pairs, args.words_per_batch, args.max_length, seed=args.seed, epochs=1
    )
    return dataset if kind == "translation" else dataset.map(lambda x, words: (x[1], words))


class Watch(keras.callbacks.Callback):
    """Looks into a model's mixtures after each epoch, and prints what it sees beside the logs.

    Args:
        batch: Pair of the model's input and the words to predict.
        steps: Training steps of an epoch.

    Attributes:
        rows: {mixture: list of rows}.
    """

    def __init__(self, batch, steps):
        super().__init__()
        self.batch, self.steps = batch, steps
        self.rows = {}

    def on_epoch_end(self, epoch, logs=None):
        step = (epoch + 1) * self.steps
        for mixture, row in look(self.model, *self.batch).items():
            load = f"{mixture}/max_over_mean_load"
            row |= {"step": step, "log": logs[load], "validation log": logs[f"val_{load}"]}
            row |= {name: logs[name] for name in ("perplexity", "val_perplexity")}
            self.rows.setdefault(mixture, []).append(row)
        print(f"step {step}, validation perplexity {logs['val_perplexity']:.1f}")
        shown = {name: rows[-1] for name, rows in self.rows.items()}
        report.print_table({name: {c: row[c] for c in COLUMNS} for name, row in shown.items()})
        for name, row in shown.items():
            parts = (f"{part} {row[f'{part} gradient']:.1e}" for part in ("task", "balance"))
            along = (f"{row[f'{part} along']:.2f}" for part in ("task", "balance"))
            print(f"{name}: gradients of {', '.join(parts)}; along what is common", *along)
            print(f"{name}: max/mean load in the logs {row['log']:.2f}", end=", ")
            print(f"of the validation {row['validation log']:.2f}", flush=True)


def look(model, x, words):
    """Returns the row of each mixture of a model, of one batch with noise and dropout."""
    mixtures = {layer.name: layer for layer in model.counted_layers if hasattr(layer, "gating")}
    with tf.GradientTape(persistent=True) as tape:
        predictions = model(x, training=True)
        cross_entropy = tf.reduce_mean(model.cross_entropy(words, predictions, training=True))
        balance = {name: tf.add_n(mixture.losses) for name, mixture in mixtures.items()}
    rows = {}
    for name, mixture in mixtures.items():
        gating = mixture.gating
        kernel = gating.gate_kernel.value
        x, mask = gating.seen
        x = x if mask is None else tf.boolean_mask(x, mask)
        rows[name] = look_into(gating, x)
        common = tf.linalg.normalize(tf.reduce_mean(x, axis=0))[0]
        for part, loss in (("task", cross_entropy), ("balance", balance[name])):
            gradient = tape.gradient(loss, kernel)
            size = float(tf.norm(gradient))
            along = float(tf.norm(tf.linalg.matvec(gradient, common, transpose_a=True)))
            rows[name] |= {f"{part} gradient": size, f"{part} along": along / (size + 1e-20)}
    return {name: {key: float(value) for key, value in row.items()} for name, row in rows.items()}


def look_into(gating, x):
    """Returns the parts of a gating's logits, and the loads to which they lead.

    Args:
        gating: A built `NoisyTopKGating`.
        x: What its kernels meet, float32 [T, D].

    Returns:
        A row of `COLUMNS`.
    """
    logits = x @ gating.gate_kernel.value
    logits -= tf.reduce_mean(logits, axis=-1, keepdims=True)  # Equal for all, it chooses nobody.
    offset = tf.reduce_mean(logits, axis=0)
    deviation = tf.math.softplus(x @ gating.noise_kernel.value) + gating.noise_epsilon
    noisy = logits + deviation * keras.random.normal(logits.shape, seed=0)
    logits_by_name = {"clean": logits, "noisy": noisy}
    chosen = {name: tf.math.top_k(h, gating.k)[1] for name, h in logits_by_name.items()}
    same = chosen["clean"][:, :, None] == chosen["noisy"][:, None, :]
    load = {
        name: losses.max_over_mean(
            losses.hard_load(tf.ones(tf.shape(index)), index, gating.num_experts)
        )
        for name, index in chosen.items()
    }
    squares = tf.reduce_mean(tf.reduce_sum(x**2, axis=-1))
    row = (
        load["noisy"],
        load["clean"],
        tf.reduce_mean(tf.cast(tf.reduce_any(same, axis=1), tf.float32)),
        tf.reduce_sum(tf.reduce_mean(x, axis=0) ** 2) / squares,
        tf.math.reduce_std(offset),
        tf.sqrt(tf.reduce_mean((logits - offset) ** 2)),
        tf.reduce_mean(deviation),
    )
    return dict(zip(COLUMNS, map(float, row), strict=True))


if __name__ == "__main__":
    experiment.run(main, parse_arguments)
