"""Queries an exported language model with TensorFlow alone and checks its answers.

    python examples/query.py saved_models/language_model/1 EXPECTED.npz

EXPECTED.npz holds `prompts`, their `tokens` and `lengths`, and the `probabilities` that the
training process computed for them.
"""

import logging
import sys

logging.getLogger("absl").setLevel(logging.ERROR)  # It warns that an export has no gradients.
# As on a server: here `import keras_moe` and `import keras` fail.
sys.modules["keras_moe"] = sys.modules["keras"] = None

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402


def main(path, expected_path):
    """Prints the likeliest next words of the prompts and how far the probabilities are off."""
    served = tf.saved_model.load(path)
    expected = np.load(expected_path)
    answer = served.signatures["next_words"](sentences=tf.constant(expected["prompts"]))
    for prompt, words, chances in zip(
        expected["prompts"], answer["words"].numpy(), answer["probabilities"].numpy(), strict=True
    ):
        guesses = ", ".join(
            f"{word.decode()} {chance:.1%}" for word, chance in zip(words, chances, strict=True)
        )
        print(f"  {prompt} … {guesses}")

    lengths = expected["lengths"]
    answer = served.signatures["serving_default"](
        tokens=tf.constant(expected["tokens"]), lengths=tf.constant(lengths)
    )
    inside = np.arange(max(lengths)) < lengths[:, None]  # Behind a prompt's end there are zeros.
    probabilities = answer["probabilities"].numpy()[inside]
    error = np.abs(probabilities - expected["probabilities"][inside]).max()
    print(
        f"{len(lengths)} prompts, {probabilities.size:,} probabilities: "
        f"at most {error:.1e} from those of the training process"
    )
    if not error < 1e-5:
        sys.exit("error: the exported model does not compute what the trained one did")


if __name__ == "__main__":
    main(*sys.argv[1:])
