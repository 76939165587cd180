"""Trains the paper's language model in small, beside a dense twin of equal operations per word.

    python examples/language_model.py                         # State of the Union addresses
    python examples/language_model.py --text my_book.txt      # any UTF-8 text
    python examples/language_model.py --dataset lm1b --width 512 --num-experts 256

Both models are embedding → LSTM → middle → LSTM → softmax, with a residual connection around each
layer and dropout on its output (appendix C). The middle of one is a mixture of experts, of which
every word uses k. That of its dense twin is a single expert, k times as wide ("MoE-1-Wide" in
Table 7) and a little wider still, which makes up for the operations of the gating. The script
compares their perplexity on held-out text, shows what some experts have specialised in (Table 9),
draws the curves, exports the mixture and queries the export from another process.
"""

import pathlib
import subprocess
import sys
import time

import experiment
import keras
import numpy as np
import report
import serving
import tensorflow as tf
import text
from experiment import SideBySide, evaluate, heading, read_words, train

import keras_moe
from keras_moe.models import LanguageModel, footprint
from keras_moe.serving import versions

ROOT = pathlib.Path(__file__).parents[1]


def parse_arguments(arguments=None):
    """Reads the command line."""
    options = (
        ("vocabulary-size", 6000, "words that the models know"),
        ("width", 32, "units of the embedding and of every layer"),
        ("num-experts", 64, "experts of the mixture"),
        ("hidden-units", 128, "hidden units of an expert"),
        ("k", 4, "experts per word"),
        ("balance-loss-weight", 0.01, "weight of the importance loss and of the load loss"),
        ("dropout", 0.1, "part of every layer's output to drop"),
        ("words-per-batch", 4096, "positions per batch"),
        ("epochs", 3, "passes over the training text"),
        ("learning-rate", 0.012, "highest learning rate of Adam"),
        ("num-sampled", 512, "words that the training's softmax draws per batch"),
        ("evaluations", 6, "points on the curves"),
        ("seed", 0, "seed of the weights, the noise and the batches"),
        ("output", ROOT / "results" / "language_model", "folder for the pictures"),
        ("export", ROOT / "saved_models" / "language_model", "folder for the exports"),
    )
    return experiment.parse_arguments(__doc__, options, arguments)


def main(args):
    """Does all that the script does and returns the rows of the table."""
    start = time.time()
    versions.check_target(args.export)  # Now, not after minutes of training.
    words, lookup = read_words(args)

    heading("Training side by side, on the same batches")
    keras.utils.set_random_seed(args.seed)
    # As many as the k experts of a word have, and so many more that the gating is paid for: its two
    # matrices [width, num_experts] cost what num_experts hidden units do.
    wide = args.k * args.hidden_units + args.num_experts
    middles = {
        "mixture": keras_moe.SparseMoE(
            args.num_experts,
            args.hidden_units,
            args.k,
            importance_loss_weight=args.balance_loss_weight,
            load_loss_weight=args.balance_loss_weight,
            seed=args.seed,
            name="mixture",
        ),
        "dense": keras.Sequential(
            [
                keras.Input((None, args.width)),
                keras.layers.Dense(wide, "relu", use_bias=False),
                keras.layers.Dense(args.width, use_bias=False),
            ]
        ),
    }
    print(f"   mixture: {args.num_experts} experts of {args.hidden_units} units, {args.k} per word")
    print(f"     dense: {wide} units")
    vocabulary_size = len(lookup.get_vocabulary())
    models = {
        name: LanguageModel(
            vocabulary_size,
            args.width,
            middle,
            dropout=args.dropout,
            num_sampled=args.num_sampled,
        )
        for name, middle in middles.items()
    }
    pair, mixture = SideBySide(models), models["mixture"]
    history = train(pair, words, args)

    heading("Whole held-out documents: perplexity per word, end of sentence counted")
    results = compare(pair, words["test"], args)
    report.print_table(results)
    heading("What the experts do: the words of the test text with the largest gates (Table 9)")
    batches = text.batches(words["test"], args.words_per_batch)
    examples = keras_moe.callbacks.ExpertExamples(batches, lookup.get_vocabulary())
    examples.find(mixture)
    examples.print_best()
    args.output.mkdir(parents=True, exist_ok=True)
    print(f"wrote {report.plot_perplexity(history, results, args.output / 'perplexity.png')}")
    print(f"wrote {report.plot_load(examples.load, args.output / 'expert_load.png')}")

    heading("Exporting the mixture, and asking it from a process without Keras")
    exported = keras_moe.export_saved_model(
        mixture,
        args.export,
        signatures=serving.signatures(mixture, lookup),
        track=[lookup],
        warm_up=serving.WARM_UP,
    )
    print(f"wrote {exported}")
    prompts = text.decode(words["test"][:64:16, :6], lookup)
    tokens, _ = serving.sequences(lookup, tf.constant(prompts))
    expected = args.output / "expected.npz"
    np.savez(expected, prompts=prompts, tokens=tokens, probabilities=np.exp(mixture(tokens)))
    query = [sys.executable, ROOT / "examples" / "query.py", exported, expected]
    subprocess.run(query, check=True)
    print(f"\nAll of it took {(time.time() - start) / 60:.1f} minutes.")
    return results


def compare(pair, sentences, args):
    """Returns the rows of the table: perplexity, size, and balance of the experts."""
    rows = {}
    for name, balance in evaluate(pair, sentences, args).items():
        operations, parameters = footprint(pair.models[name])
        rows[name] = {
            "perplexity": balance.pop("perplexity"),
            "ops/timestep": operations,
            "parameters": parameters,
            **balance,
        }
    return rows


if __name__ == "__main__":
    experiment.run(main, parse_arguments)
