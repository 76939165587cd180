"""Makes a trained mixture-of-experts language model smaller, and shows what that costs.

    python examples/compress.py                               # State of the Union addresses
    python examples/compress.py --text my_book.txt            # any UTF-8 text

It trains the mixture of `language_model.py`, exports it in several ways, and asks the exports:
perplexity on held-out text, size on disk, and the time that an answer takes.

- bfloat16: all matrices but the gating's in half the room.
- int8: the experts' kernels in a quarter of it, by `quantize`.
- pruned: without the experts that the validation text doesn't use, or little.
"""

import itertools
import logging
import pathlib
import statistics
import time

import batching
import experiment
import keras
import numpy as np
import report
import tensorflow as tf
import vocabulary
from experiment import SideBySide, heading, read_words, train

import keras_moe
from keras_moe.models import LanguageModel

ROOT = pathlib.Path(__file__).parents[1]
ROUNDS = 100  # how often each export is asked, to tell its time


def parse_arguments(arguments=None):
    """Reads the command line."""
    options = (
        *experiment.MIXTURE_OPTIONS,
        ("min-share", 0.8, "part of the even share of words that an expert must have to stay"),
        ("export", ROOT / "saved_models" / "compressed", "folder for the exports"),
    )
    return experiment.parse_arguments(__doc__, options, arguments, evaluations=3)


def main(args):
    """Does all that the script does and returns the rows of the table."""
    words, lookup = read_words(args)
    heading("Training")
    keras.utils.set_random_seed(args.seed)
    mixture = experiment.make_mixture(args)
    sizes = (len(lookup.get_vocabulary()), args.width)
    model = LanguageModel(*sizes, mixture, dropout=args.dropout, num_sampled=args.num_sampled)
    train(SideBySide({"mixture": model}), words, args)

    heading("Which experts the validation text uses")
    validation = batching.batches(words["validation"], args.words_per_batch)
    models = {}
    for name, min_share in (("pruned, unused", 0.0), ("pruned, little used", args.min_share)):
        keep = keras_moe.used_experts(model, validation, min_share)["mixture"]
        print(f"{name}: {len(keep)} of {args.num_experts} experts stay")
        models[name] = LanguageModel(*sizes, keras_moe.prune(mixture, keep))
        models[name].build((None, None))
        for old, new in zip(common_layers(model), common_layers(models[name]), strict=True):
            new.set_weights(old.get_weights())

    heading("Exporting")
    exports = {"float32": export(model, args), "bfloat16": export(model, args, dtype="bfloat16")}
    exports |= {name: export(pruned, args) for name, pruned in models.items()}
    mixture.experts.quantize("int8")
    exports["int8 experts"] = export(model, args)
    exports["int8 experts, rest bfloat16"] = export(model, args, dtype="bfloat16")

    heading("Whole held-out documents: perplexity per word, end of sentence counted")
    rows = compare(exports, words["test"], args)
    report.print_table(rows)
    return rows


def common_layers(model):
    """All layers but the mixture."""
    return model.embedding, *model.lstms, model.softmax


def export(model, args, **options):
    """Exports a model with one signature: the cross-entropy of each target, 0 for padding."""

    def cross_entropy(tokens, targets):
        losses = -tf.gather(model(tokens), targets, batch_dims=2)
        return {"losses": tf.where(targets == vocabulary.PADDING_ID, 0.0, losses)}

    specs = [tf.TensorSpec([None, None], tf.int32, name) for name in ("tokens", "targets")]
    signatures = {"serving_default": (cross_entropy, specs)}
    return keras_moe.export_saved_model(model, args.export, signatures=signatures, **options)


def compare(exports, sentences, args):
    """Returns the rows of the table: perplexity, size, and times that a call takes."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # It warns that an export has no gradients.
    loaded = {name: tf.saved_model.load(path) for name, path in exports.items()}
    served = {name: model.signatures["serving_default"] for name, model in loaded.items()}
    batches = list(batching.batches(sentences, args.words_per_batch))
    number = sum(np.count_nonzero(targets != vocabulary.PADDING_ID) for _, targets in batches)
    tokens, targets = batches[0]
    calls = {"one word": (tokens[:1, :1], targets[:1, :1]), "batch": (tokens, targets)}
    times = {(name, call): [] for name in served for call in calls}
    for _, (name, call) in itertools.product(range(ROUNDS), times):
        tokens, targets = calls[call]
        start = time.perf_counter()
        served[name](tokens=tokens, targets=targets)["losses"].numpy()
        times[name, call].append(time.perf_counter() - start)

    rows = {}
    for name, path in exports.items():
        losses = [
            np.sum(served[name](tokens=tokens, targets=targets)["losses"], dtype="float64")
            for tokens, targets in batches
        ]
        files = [file for file in pathlib.Path(path).rglob("*") if file.is_file()]
        perplexity = float(np.exp(np.sum(losses) / number))
        first = next(iter(rows.values()), {"perplexity": perplexity})["perplexity"]
        rows[name] = {
            "perplexity": perplexity,
            "higher by, %": 100 * (perplexity / first - 1),
            "weights, MB": sum(f.stat().st_size for f in files if ".data-" in f.name) / 1e6,
            "with graphs, MB": sum(file.stat().st_size for file in files) / 1e6,
            **{f"{call}, ms": 1000 * statistics.median(times[name, call][10:]) for call in calls},
        }
    return rows


if __name__ == "__main__":
    experiment.run(main, parse_arguments)
