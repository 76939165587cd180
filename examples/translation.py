"""Trains the paper's translation models, in small or in the paper's size.

    python examples/translation.py                                   # messages of Django
    python examples/translation.py --data en-fr.train.tsv.xz         # any pairs of sentences
    python examples/translation.py --dataset wmt14_translate --pairs en-fr --width 512
    python examples/translation.py --dataset wmt14_translate --pairs en-fr en-de --width 512

Appendix E: an encoder and a decoder of LSTMs with attention, a mixture of experts in each. The
models of `--presets` see the same batches, all their sizes scaled to `--width`; "no-experts" is the
paper's baseline, the same model without the mixtures. One model learns all `--pairs`, or all files
of `--data`: with several of them each source begins with the language to write (section 5.4).

The script shows perplexity per word piece and BLEU on held-out pairs, translations beside their
references, and what the first model attends to; it exports that model, and has another process
translate with the export. Django's messages are few: they show how it is done, and what is learned
from them hardly translates anything else.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

import experiment
import keras
import numpy as np
import pair_batching
import parallel_text
import report
import translating
import translation_models
import word_pieces
from bleu import bleu, signature
from django_catalogs import DjangoCatalogs
from experiment import SideBySide, heading
from translating import Translator
from translation_models import make_model
from width_scaled_adam import WidthScaledAdam

import keras_moe
from keras_moe.callbacks import ExpertExamples, Throughput
from keras_moe.models import TRANSLATION_PRESETS, footprint
from keras_moe.optimizers import WarmupInverseSqrt
from keras_moe.serving import versions

ROOT = pathlib.Path(__file__).parents[1]


def parse_arguments(arguments=None):
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--data",
        metavar="FILE",
        nargs="+",
        help="UTF-8 files, on each line a sentence, a tab and its translation; beside "
        "NAME.train.tsv, NAME.valid.tsv and NAME.test.tsv are held out; .gz, .bz2 and .xz are "
        "decompressed",
    )
    source.add_argument("--dataset", default=DjangoCatalogs.name, help="of tensorflow-datasets")
    options = (
        ("pairs", ["en-fr"], "of languages, source and target, of the dataset"),
        ("presets", ["MoE-32", "no-experts"], f"of {', '.join(TRANSLATION_PRESETS)}"),
        ("vocabulary-size", 1500, "word pieces that the models know"),
        *translation_models.OPTIONS,
        ("words-per-batch", 2048, "positions per batch, of a pair those of its longer side"),
        ("max-length", 96, "the longest sides of a training pair, in word pieces"),
        ("epochs", 30, "passes over the training pairs"),
        ("learning-rate", 0.005, "highest learning rate of Adam"),
        (
            "full-rate-inputs",
            0,
            "inputs beyond which a layer of the experts learns at a lower rate, by "
            "width_scaled_adam.py; 0 for the same rate everywhere",
        ),
        ("warm-up", 100, "steps in which the learning rate rises; the paper's are 2000"),
        ("hold", 300, "steps at the highest one, then it falls with 1/√step; the paper's are 8000"),
        ("evaluations", 3, "evaluations on the validation pairs"),
        ("beam-width", 4, "hypotheses of the beam search"),
        ("length-penalty", 0.6, "its length normalisation α"),
        ("coverage-penalty", 0.2, "its coverage penalty β"),
        ("seed", 0, "seed of the weights, the noise and the batches"),
        ("output", ROOT / "results" / "translation", "folder for the pictures"),
        ("export", ROOT / "saved_models" / "translation", "folder for the exports"),
    )
    experiment.add_options(parser, options)
    return parser.parse_args(arguments)


def main(args):
    """Does all that the script does and returns the rows of the table of each pair."""
    start = time.time()
    # All of these refuse now, not after minutes of training.
    versions.check_target(args.export)
    make_optimizer(args)
    for preset in args.presets:
        make_model(preset, 1, args)
    data, pieces = read_pairs(args)

    heading("Training")
    keras.utils.set_random_seed(args.seed)
    together = SideBySide({name: make_model(name, pieces.size, args) for name in args.presets})
    history = train(together, data, args)
    words_per_second = np.median(history.history["words_per_second"])
    print(f"{words_per_second:,.0f} word pieces of translations per second, all models together")
    args.output.mkdir(parents=True, exist_ok=True)
    picture = report.plot_perplexity(history, sizes(together), args.output / "perplexity.png")
    print(f"wrote {picture}")

    heading(f"Held-out pairs: perplexity per word piece, end counted, and BLEU ({signature()})")
    options = {
        "beam_width": args.beam_width,
        "length_penalty": args.length_penalty,
        "coverage_penalty": args.coverage_penalty,
    }
    translators = {
        name: Translator(model, pieces, **options) for name, model in together.models.items()
    }
    results, shown = {}, {}
    for pair, parts in data.items():
        results[pair], translations = compare(together, parts["test"], translators, args)
        print(f"{pair}:")
        report.print_table(results[pair])
        show(parts["test"], translations, pieces, number=max(1, 6 // len(data)))
        shown[pair] = translations

    name, model = next(iter(together.models.items()))
    tests = pair_batching.together([parts["test"] for parts in data.values()])
    if model.encoder_middle is not None:
        heading(f"What the encoder's experts in {name} do: word pieces with the largest gates")
        batches = make_batches(tests, args)
        examples = ExpertExamples(batches, pieces.text, model.encoder_middle, tokens=0)
        examples.find(model)
        examples.print_best()
    heading(f"What {name} attends to, and its export, which another process translates with")
    picture = plot_attention(model, tests, pieces, args.output / "attention.png")
    print(f"wrote {picture}")
    exported = keras_moe.export_saved_model(
        model,
        args.export,
        signatures=translators[name].signatures(),
        warm_up=translating.WARM_UP,
        server_files=True,
    )
    print(f"wrote {exported}")
    check_export(exported, data, shown, name, pieces, args)
    print(f"\nAll of it took {(time.time() - start) / 60:.1f} minutes.")
    return results


def read_pairs(args):
    """Reads the pairs that the command line names, and tells their size.

    Returns:
        Encoded `Pairs` by part by pair of languages, and the `WordPieces`, learned from the
        training part.
    """
    heading(f"Reading {', '.join(args.data or [f'{args.dataset}: ' + ' '.join(args.pairs)])}")
    if args.data:
        corpora = parallel_text.load_files(args.data)
    else:
        corpora = parallel_text.load_dataset(args.dataset, args.pairs)
    words = []
    if len(corpora) > 1:
        words = sorted({parallel_text.target_token(pair) for pair in corpora})
        corpora = parallel_text.name_targets(corpora)
    vocabulary = word_pieces.learn(
        parallel_text.sentences(corpora), args.vocabulary_size, words=words
    )
    pieces = word_pieces.WordPieces(vocabulary)
    data = {
        pair: {part: pair_batching.encode(examples, pieces) for part, examples in parts.items()}
        for pair, parts in corpora.items()
    }
    for pair, parts in data.items():
        for part, (sources, targets) in parts.items():
            print(f"{pair:>8} {part:>10}: {sources.nrows():9,} pairs,", end=" ")
            sizes = (side.flat_values.shape[0] for side in (sources, targets))
            print("{:11,} and {:11,} word pieces".format(*sizes))
    return data, pieces


def train(together, data, args):
    """Trains on batches that depend on the seed alone; returns the history of `fit`."""
    train, validation = (
        pair_batching.together([parts[part] for parts in data.values()])
        for part in ("train", "validation")
    )
    short = train.up_to(args.max_length)
    left_out = len(train.lengths) - len(short.lengths)
    if left_out:
        print(f"{left_out:,} pairs of more than {args.max_length} word pieces are left out.")
    batches = make_batches(short, args, seed=args.seed, epochs=args.epochs)
    steps = len(batches)
    together.build((None, None))
    operations = sum(footprint(model).ops_per_timestep for model in together.models.values())
    softmax = sum(model.width * model.vocabulary_size for model in together.models.values())
    words = args.epochs * short.targets.flat_values.shape[0]
    return experiment.fit(
        together,
        batches,
        make_batches(validation, args),
        make_optimizer(args),
        args.evaluations,
        [
            Throughput(operations, words / steps, softmax),
            report.Progress(list(together.models), steps, sampled=False),
        ],
    )


def make_optimizer(args):
    """Returns Adam with the paper's schedule."""
    learning_rate = WarmupInverseSqrt(args.learning_rate, args.warm_up, args.hold)
    if args.full_rate_inputs:
        return WidthScaledAdam(learning_rate, args.full_rate_inputs)
    return keras.optimizers.Adam(learning_rate)


def make_batches(pairs, args, **options):
    """Batches for training, or of all pairs for evaluation."""
    longest = int(pairs.lengths.max())
    return pair_batching.batches(pairs, max(args.words_per_batch, longest), longest, **options)


def sizes(together):
    """The parameters of each model, for the legend of a picture."""
    return {
        name: {"parameters": footprint(model).parameters} for name, model in together.models.items()
    }


def compare(together, pairs, translators, args):
    """Returns the rows of the table of held-out pairs, and their translations by model."""
    logs = together.evaluate(make_batches(pairs, args), return_dict=True, verbose=0)
    rows, translations = {}, {}
    for name, translator in translators.items():
        references = strings(pairs.targets, translator.pieces)
        translations[name] = translator.translate_all(pairs.sources, args.words_per_batch)
        operations, parameters = footprint(translator.model)
        rows[name] = {
            "perplexity": logs[f"{name}/perplexity"],
            "BLEU": bleu(translations[name], references),
            "ops/timestep": operations,
            "parameters": parameters,
            **{
                f"max/mean load, {part}": logs.get(f"{name}_{part}_moe/max_over_mean_load")
                for part in ("encoder", "decoder")
            },
        }
    return rows, translations


def strings(ids, pieces):
    """Returns a list of strings from ids with ends."""
    return [string.decode() for string in pieces.detokenize(ids).numpy()]


def show(pairs, translations, pieces, number):
    """Prints some translations by each model beside the references."""
    for i in np.linspace(0, len(pairs.lengths), number, endpoint=False, dtype=int):
        texts = {
            "source": strings(pairs.sources[i : i + 1], pieces)[0],
            "reference": strings(pairs.targets[i : i + 1], pieces)[0],
            **{name: translated[i] for name, translated in translations.items()},
        }
        print()
        for label, string in texts.items():
            print(f"{label:>12}  {string}")
    print()


def plot_attention(model, pairs, pieces, path):
    """Draws how a model attends while it writes the references of pairs of middling length."""
    lengths = pairs.lengths
    middling = np.argsort(np.abs(lengths - 15), kind="stable")[:4]
    drawn = []
    for i in middling:
        source, words = (side[i].numpy().tolist() for side in pairs)
        weights = translating.attention(model, source, words)
        drawn.append((pieces.names(source), pieces.names(words), weights))
    return report.plot_attention(drawn, path)


def check_export(exported, data, shown, name, pieces, args, number=8):
    """Has another process translate and compare with what this one has found."""
    expected = {}
    for pair, parts in data.items():
        sources = strings(parts["test"].sources[:number], pieces)
        expected.update(zip(sources, shown[pair][name], strict=False))
    path = args.output / "expected.json"
    path.write_text(json.dumps(expected, ensure_ascii=False, indent=1), encoding="utf-8")
    command = [sys.executable, ROOT / "examples" / "translate.py", exported, "--expected", path]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    experiment.run(main, parse_arguments)
