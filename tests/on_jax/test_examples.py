"""The language-model example on JAX, where each shape of a batch is compiled anew."""

import batching
import numpy as np
import tensorflow as tf
from experiment import SideBySide

from keras_moe import SparseMoE
from keras_moe.models import LanguageModel


def test_batches_have_few_shapes_and_each_word_once():
    rng = np.random.default_rng(0)
    words = [list(rng.integers(3, 50, rng.integers(1, 40))) for _ in range(60)]
    batches = list(batching.batches(tf.ragged.constant(words, dtype="int32"), 128, 32))
    # Widths are multiples of 16 up to 32, and as many sentences as 128 positions have room for.
    assert {inputs.shape for inputs, _ in batches} == {(8, 16), (4, 32)}
    found = np.concatenate([targets.numpy().ravel() for _, targets in batches])
    wanted = np.concatenate([*words, np.full(60, batching.EOS_ID)])
    np.testing.assert_array_equal(np.sort(found[found != 0]), np.sort(wanted))


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
