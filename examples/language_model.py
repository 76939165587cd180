"""Trains the paper's language models, in small or in the paper's size.

    python examples/language_model.py                         # State of the Union addresses
    python examples/language_model.py --text my_book.txt      # any UTF-8 text
    python examples/language_model.py --dataset lm1b --preset MoE-256-h --width 512

All models are embedding → LSTM → middle → LSTM → softmax, with a residual connection around each
layer and dropout on its output (appendix C). Without `--preset` there are two, which see the same
batches: the middle of one is a mixture of experts, of which every word uses k. That of its dense
twin is a single expert, k times as wide ("MoE-1-Wide" in Table 7) and a little wider still, which
makes up for the operations of the gating. With `--preset` there is the one of that row of Table 7
or 8, with its dropout and balance losses, all of its sizes scaled to `--width`.

The script shows perplexity on held-out text, what some experts have specialised in (Table 9), and
sentences that the model writes, draws the curves, exports the model and queries the export from
another process. With `KERAS_BACKEND=jax` it trains on JAX, where TensorFlow needn't be installed,
and saves the model in place of the export, which TensorFlow alone can do.
"""

import pathlib
import subprocess
import sys
import time

import batching
import experiment
import keras
import numpy as np
import report
import word_ids
from experiment import SideBySide, evaluate, heading, read_words, train

import keras_moe
from keras_moe.models import PRESETS, LanguageModel, footprint, generate
from keras_moe.serving import versions

ROOT = pathlib.Path(__file__).parents[1]


def parse_arguments(arguments=None):
    """Reads the command line."""
    options = (
        ("preset", "", f"of {', '.join(PRESETS)}; without one, a mixture and its dense twin"),
        *experiment.MIXTURE_OPTIONS,
        ("temperature", 0.7, "of the sentences that the model writes: low ones are likely"),
        ("output", ROOT / "results" / "language_model", "folder for the pictures"),
        ("export", ROOT / "saved_models" / "language_model", "folder for the exports"),
    )
    args = experiment.parse_arguments(__doc__, options, arguments)
    if args.preset:
        LanguageModel.from_preset(args.preset, 1, args.width)  # Refuses what there isn't.
    return args


def main(args):
    """Does all that the script does and returns the rows of the table."""
    start = time.time()
    if keras.config.backend() == "tensorflow":
        versions.check_target(args.export)  # Now, not after minutes of training.
    words, lookup = read_words(args)

    heading("Training")
    keras.utils.set_random_seed(args.seed)
    make = make_preset if args.preset else make_pair
    models = make(len(lookup.get_vocabulary()), args)
    name, model = next(iter(models.items()))
    together = SideBySide(models)
    history = train(together, words, args)
    speeds = (history.history[column] for column in ("words_per_second", "tflops_per_device"))
    print("{:,.0f} words per second, {:.3g} TFLOPS".format(*map(np.median, speeds)))

    heading("Held-out text: perplexity per word, end of sentence counted")
    results = compare(together, words["test"], args)
    report.print_table(results)
    args.output.mkdir(parents=True, exist_ok=True)
    print(f"wrote {report.plot_perplexity(history, results, args.output / 'perplexity.png')}")
    if isinstance(model.middle, keras_moe.SparseMoE):
        heading("What the experts do: the words of the test text with the largest gates (Table 9)")
        batches = batching.batches(words["test"], args.words_per_batch)
        examples = keras_moe.callbacks.ExpertExamples(batches, lookup.get_vocabulary())
        examples.find(model)
        examples.print_best()
        print(f"wrote {report.plot_load(examples.load, args.output / 'expert_load.png')}")

    heading(f"What {name} writes, the first three words given")
    write(model, [ids[:3] for ids in words["test"][:40:8].to_list()], lookup, args)

    if keras.config.backend() == "tensorflow":
        export(name, model, words["test"], lookup, args)
    else:
        saved = args.output / "model.keras"
        model.save(saved)
        print(
            f"\nwrote {saved}. Exports are TensorFlow's: load it under KERAS_BACKEND=tensorflow, "
            "then `keras_moe.export_saved_model`."
        )
    print(f"\nAll of it took {(time.time() - start) / 60:.1f} minutes.")
    return results


def export(name, model, sentences, lookup, args):
    """Exports a model, and asks the export from a process of TensorFlow alone."""
    import serving

    heading(f"Exporting {name}, and asking it from a process without Keras")
    exported = keras_moe.export_saved_model(
        model,
        args.export,
        signatures=serving.signatures(model, lookup),
        track=[lookup],
        warm_up=serving.WARM_UP,
        server_files=True,
    )
    print(f"wrote {exported}")
    prompts = word_ids.decode(sentences[:64:16, :6], lookup)
    tokens, _ = serving.sequences(lookup, np.array(prompts))
    lengths = np.count_nonzero(tokens, axis=1).astype("int32")
    expected, probabilities = args.output / "expected.npz", np.exp(model(tokens))
    np.savez(expected, prompts=prompts, tokens=tokens, lengths=lengths, probabilities=probabilities)
    query = [sys.executable, ROOT / "examples" / "query.py", exported, expected]
    subprocess.run(query, check=True)


def make_preset(vocabulary_size, args):
    """Returns the model of a row of Table 7 or 8, by its name."""
    options = {"num_sampled": args.num_sampled, "name": args.preset, "seed": args.seed}
    model = LanguageModel.from_preset(args.preset, vocabulary_size, args.width, **options)
    return {args.preset: model}


def make_pair(vocabulary_size, args):
    """Returns the mixture and its dense twin, by name."""
    # As many units as the k experts of a word have, and so many more that the gating is paid for:
    # its two matrices [width, num_experts] cost what num_experts hidden units do.
    wide = args.k * args.hidden_units + args.num_experts
    middles = {
        "mixture": experiment.make_mixture(args),
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
    options = {"dropout": args.dropout, "num_sampled": args.num_sampled}
    return {
        name: LanguageModel(vocabulary_size, args.width, middle, **options)
        for name, middle in middles.items()
    }


def write(model, prompts, lookup, args):
    """Prints sentences that the model draws word by word, the prompts in brackets."""
    sentences = generate(
        model,
        prompts,
        word_ids.EOS_ID,
        excluded=(word_ids.PADDING_ID, word_ids.UNKNOWN_ID),
        temperature=args.temperature,
        seed=args.seed,
    )
    for prompt, sentence in zip(prompts, sentences, strict=True):
        parts = word_ids.decode([prompt, sentence[len(prompt) :]], lookup)
        print("  [{}] {}".format(*parts))


def compare(together, sentences, args):
    """Returns the rows of the table: perplexity, size, and balance of the experts."""
    rows = {}
    for name, balance in evaluate(together, sentences, args).items():
        operations, parameters = footprint(together.models[name])
        rows[name] = {
            "perplexity": balance.pop("perplexity"),
            "ops/timestep": operations,
            "parameters": parameters,
            **balance,
        }
    return rows


if __name__ == "__main__":
    experiment.run(main, parse_arguments)
