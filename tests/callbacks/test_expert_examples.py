"""`ExpertExamples`: the inputs that single experts like best."""

import dataclasses

import keras
import numpy as np
import pytest
from helpers import CROSS_ENTROPY
from keras import ops

from keras_moe import Routing, SparseMoE, losses
from keras_moe.callbacks import ExpertExample, ExpertExamples
from keras_moe.models import TRANSLATION_PRESETS, TranslationModel

WORDS = ["", "a", "big", "cat", "sat", "down", "today"]


class WordGating(keras.layers.Layer):
    """Experts and gates by word, given its id as the first feature.

    Expert 0 likes "big" and then "cat", expert 1 "sat". "down" has gates that are not finite, and
    "today" and the padding have a choice of expert 2 that counts for nothing. A batch of 8 words
    is given a third choice that doesn't count either.
    """

    num_experts = 4
    experts = np.array([(2, 2), (0, 1), (0, 1), (1, 0), (1, 0), (0, 1), (1, 2)], "int32")
    gates = np.array(
        [(0.9, 0), (0.2, 0.1), (0.9, 0.1), (0.3, 0.5), (0.8, 0.2), (np.nan, np.inf), (0.4, 0)],
        "float32",
    )

    def __init__(self):
        super().__init__()
        self.supports_masking = True

    def call(self, x, training=None, mask=None):
        word = ops.cast(x[:, 0], "int32")
        expert, gates = (ops.take(table, word, axis=0) for table in (self.experts, self.gates))
        if x.shape[0] == 8:
            expert, gates = (ops.pad(part, [(0, 0), (0, 1)]) for part in (expert, gates))
        if mask is not None:
            gates = ops.where(mask[:, None], gates, 0.0)
        load = losses.hard_load(gates, expert, 4)
        return Routing(expert, gates, losses.importance(gates, expert, 4), load)


def word_model():
    embedding = keras.layers.Embedding(7, 2, mask_zero=True)
    moe = SparseMoE(4, 3, gating=WordGating(), name="moe")
    model = keras.Sequential([embedding, moe, keras.layers.Dense(7)])
    model.build((None, None))
    embedding.set_weights([np.stack([np.arange(7.0), np.zeros(7)], axis=-1)])
    embedding.trainable = False
    return model


#                  a  big cat sat        big cat sat down    a  cat sat today  big a  cat sat
LINES = np.array([(1, 2, 3, 4), (2, 3, 4, 5), (1, 3, 4, 6), (2, 1, 3, 0)])


def test_the_best_examples_of_each_expert(capsys):
    examples = ExpertExamples(LINES, WORDS, examples=4, before=1, after=2, experts=None)
    examples.find(word_model())
    # "big" 3 times with 0.9, then the first "cat" with 0.5.
    assert [example[1:] for example in examples.best[0]] == [
        (0, 1, "a", "big", "cat sat"),
        (1, 0, "", "big", "cat sat"),
        (3, 0, "", "big", "a cat"),
        (0, 2, "big", "cat", "sat"),
    ]
    np.testing.assert_allclose([e.gate for e in examples.best[0]], [0.9, 0.9, 0.9, 0.5])
    # "sat" 3 times with 0.8, then "today" with 0.4; the infinite gate of "down" is left out.
    assert [(e.token, e.line, e.position) for e in examples.best[1]] == [
        ("sat", 0, 3),
        ("sat", 1, 2),
        ("sat", 2, 2),
        ("today", 2, 3),
    ]
    assert examples.best[2] == examples.best[3] == []
    assert isinstance(examples.best[0][0], ExpertExample)
    # Two choices for each of 3 "a", 3 "big", 4 "cat", 3 "sat"; "today" and "down" have one.
    np.testing.assert_array_equal(examples.load, [13, 13 + 1 + 1, 0, 0])
    examples.print_best()
    assert capsys.readouterr().out == (
        "expert 0, 13 tokens\n"
        "  0.90  a [big] cat sat\n"
        "  0.90  [big] cat sat\n"
        "  0.90  [big] a cat\n"
        "  0.50  big [cat] sat\n"
        "expert 1, 15 tokens\n"
        "  0.80  cat [sat]\n"
        "  0.80  cat [sat] down\n"
        "  0.80  cat [sat] today\n"
        "  0.40  sat [today]\n"
    )


@pytest.mark.parametrize("lines", [2, 3])
def test_batches_do_not_change_the_examples(lines):
    model = word_model()
    # Batches of 2 lines have 3 choices per word instead of 2; behind one of 3 there is one of 1.
    starts = range(0, len(LINES), lines)
    batches = [(LINES[i : i + lines], LINES[i : i + lines]) for i in starts]
    whole = ExpertExamples(LINES, WORDS)
    parts = ExpertExamples(batches, lambda ids: " ".join(WORDS[i] for i in ids if i), layer="moe")
    whole.find(model)
    parts.find(model)
    assert parts.best == whole.best
    np.testing.assert_array_equal(parts.load, whole.load)


@pytest.mark.parametrize("each_epoch, times", [(False, 1), (True, 2)])
def test_examples_are_printed_in_fit(each_epoch, times, capsys):
    model = word_model()
    model.compile("sgd", CROSS_ENTROPY)
    examples = ExpertExamples(LINES, WORDS, model.layers[1], experts=1, each_epoch=each_epoch)
    model.fit(LINES, LINES, epochs=2, verbose=0, callbacks=[examples])
    output = capsys.readouterr().out
    assert output.count("expert 0, 13 tokens\n  0.90  a [big] cat sat\n") == times
    assert "expert 1" not in output


def test_one_of_several_layers_has_to_be_named():
    model = keras.Sequential(
        [keras.layers.Embedding(7, 4), SparseMoE(2, 3, k=1, name="one"), SparseMoE(3, 3, k=1)]
    )
    model.build((None, None))
    for layer in (None, "two", SparseMoE(2, 3, k=1)):
        with pytest.raises(ValueError, match="`layer` must be .* a model with .*one"):
            ExpertExamples(LINES, WORDS, layer).find(model)
    examples = ExpertExamples(LINES, WORDS, "one")
    examples.find(model)
    assert len(examples.best) == 2


def test_positions_have_to_be_those_of_the_tokens():
    pooled = keras.Sequential(
        [keras.layers.Embedding(7, 4), keras.layers.GlobalAveragePooling1D(), SparseMoE(2, 3, k=1)]
    )
    with pytest.raises(ValueError, match=r"shape \(4, 4\), for which .* routed 4 examples"):
        ExpertExamples(LINES, WORDS).find(pooled)


@pytest.mark.parametrize("part, key", [("encoder", 0), ("decoder", 1)])
def test_each_mixture_of_a_translation_model_has_tokens_of_its_own(part, key):
    sizes = {"num_experts": 4, "k": 2, "num_lstms": (2, 1)}
    preset = dataclasses.replace(TRANSLATION_PRESETS["MoE-32"], **sizes)
    model = TranslationModel.from_preset(preset, len(WORDS), width=8, seed=0)
    sources, targets = LINES, np.array([(2, 5, 5, 6, 1), (2, 6, 0, 0, 0)] * 2)
    model.build(None)
    batches = [((sources[:2], targets[:2]), targets[:2]), ((sources[2:], targets[2:]), targets[2:])]
    examples = ExpertExamples(batches, WORDS, f"{part}_moe", tokens=key, examples=40)
    examples.find(model)
    lines, found = (sources, targets)[key], sum(examples.best, [])
    # Words meet experts, padding none; all of them are kept.
    real = {(i, j) for i, j in zip(*np.nonzero(lines), strict=True)}
    assert {(e.line, e.position) for e in found} <= real and len(found) == examples.load.sum() > 0
    assert all(e.token == WORDS[lines[e.line, e.position]] for e in found)

    for wrong in (None, 2, "source"):
        with pytest.raises(ValueError, match=rf"Received: tokens={wrong!r}, where .* \[0, 1\]"):
            ExpertExamples(batches, WORDS, f"{part}_moe", tokens=wrong).find(model)
    with pytest.raises(ValueError, match=r"Received: tokens=0, where .* \[None\]"):
        ExpertExamples(LINES, WORDS, tokens=0).find(word_model())
    with pytest.raises(ValueError, match="for which .* routed"):  # The others are as many lines.
        ExpertExamples(batches, WORDS, f"{part}_moe", tokens=1 - key).find(model)


@pytest.mark.parametrize(
    "x, vocabulary, message",
    [
        (LINES.astype("float32"), WORDS, r"integer tokens.*shape \(4, 4\), dtype float32"),
        (LINES[0], WORDS, r"integer tokens.*shape \(4,\), dtype int"),
        ({"tokens": LINES}, WORDS, r"Received: tokens=None, where .* \['tokens'\]"),
        (LINES, WORDS[:3], "3 words, token [3-6]"),
    ],
)
def test_what_is_no_text_is_refused(x, vocabulary, message):
    with pytest.raises(ValueError, match=message):
        ExpertExamples(x, vocabulary).find(word_model())
