"""Translates sentences with an exported model, with TensorFlow and tensorflow-text alone.

    python examples/translate.py saved_models/translation/1 "Good morning."
    python examples/translate.py saved_models/translation/1 --expected EXPECTED.json

EXPECTED.json is an object of sentences and the translations that the training process found; the
second command checks that the export finds the same ones.
"""

import argparse
import json
import logging
import pathlib
import sys

logging.getLogger("absl").setLevel(logging.ERROR)  # It warns that an export has no gradients.
sys.modules["keras_moe"] = None  # As on a server: here `import keras_moe` fails.

import tensorflow as tf  # noqa: E402
import tensorflow_text  # noqa: E402, F401  # the operations of word pieces, which servers have


def parse_arguments(arguments=None):
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", metavar="VERSION", help="folder of a version of the export")
    parser.add_argument("sentences", metavar="SENTENCE", nargs="*", help="what to translate")
    parser.add_argument("--expected", metavar="FILE", help="translations to compare with")
    return parser.parse_args(arguments)


def main(args):
    """Prints translations, and in how many of them the export and the training process differ."""
    expected = json.loads(pathlib.Path(args.expected).read_text("utf-8")) if args.expected else {}
    sentences = [*args.sentences, *expected]
    served = tf.saved_model.load(args.path)
    translate = served.signatures["serving_default"]
    translations = translate(sentences=tf.constant(sentences, tf.string))["translations"].numpy()
    different = 0
    for sentence, translation in zip(sentences, translations, strict=True):
        translation = translation.decode()
        print(f"  {sentence} … {translation}")
        if expected.get(sentence, translation) != translation:
            different += 1
            print(f"    expected: {expected[sentence]}")
    if expected:
        print(f"{len(expected)} translations, {different} other than those of the training process")
    if different:
        sys.exit("error: the exported model does not translate as the trained one did")


if __name__ == "__main__":
    main(parse_arguments())
