"""The example that looks into noisy gatings as they learn."""

import json

import collapse
import django_catalogs
import matplotlib.image
import numpy as np
import pytest
import tensorflow as tf


def test_the_parts_of_logits_and_the_loads():
    gating = collapse.WatchedGating(4, k=1)
    gating.build((None, 2))
    gating.gate_kernel.assign([[3.0, 1.0, 1.0, -1.0], [0.0, 0.5, -0.5, 0.0]])
    x = tf.constant([[1.0, 1.0], [1.0, -1.0]])
    row = collapse.look_into(gating, x)
    # What is common is (1, 0), whose square is 1, beside squares of 2.
    assert row["common"] == pytest.approx(0.5)
    # It adds (3, 1, 1, -1), less the mean (2, 0, 0, -2): variance (4 + 4) / 4.
    assert row["offset"] == pytest.approx(2**0.5)
    # From there the words differ by ±(0, 1/2, -1/2, 0): a mean square of (1/4 + 1/4) / 4.
    assert row["spread"] == pytest.approx(0.125**0.5)
    assert row["noise"] == pytest.approx(np.log(2) + 0.01)  # softplus(0) and ε
    assert row["load"] == pytest.approx(4.0)  # Both go to the first of 4 experts.
    assert 2.0 <= row["load, noisy"] <= 4.0


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What the script returns, wrote and printed for a tiny language model."""
    folder = tmp_path_factory.mktemp("collapse")
    lines = ["\t".join(pair) for pair in django_catalogs.messages("fr")[:120]]
    (folder / "en-fr.tsv").write_text("\n".join(lines), encoding="utf-8")
    size = "--vocabulary-size 500 --width 4 --num-experts 4 --hidden-units 4 --steps 2 --warm-up 1"
    options = "--models language --settings both --evaluations 2 --words-per-batch 256"
    files = ["--data", str(folder / "en-fr.tsv"), "--output", str(folder / "out")]
    args = collapse.parse_arguments([*size.split(), *options.split(), *files])
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *parts, **_: printed.extend(map(str, parts)))
        found = collapse.main(args)
    return found, folder / "out", "\n".join(printed)


def test_looks_are_returned_and_written(ran):
    found, folder, printed = ran
    assert list(found) == ["language, both"]
    rows = found["language, both"]["middle"]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert 1 <= row["load, noisy"] <= 2.001  # With k = 2 of 4 experts twice the mean at most.
        assert 1 <= row["validation log"] <= 2.001
        assert 1 < row["val_perplexity"] < 600
        assert 0 <= row["balance along"] <= 1.001
        assert row["task gradient"] > 0
    written = json.loads((folder / "collapse.json").read_text())
    assert written["found"] == found
    assert written["arguments"]["steps"] == 2
    assert "of the validation" in printed
    picture = matplotlib.image.imread(folder / "collapse.png")
    assert picture.std() > 0.02  # not blank


@pytest.mark.parametrize("arguments", [["--models", "image"], ["--settings", "noisy"]])
def test_what_there_is_not_is_refused(arguments):
    with pytest.raises(ValueError, match=f"Received: \\['{arguments[1]}'\\]"):
        collapse.parse_arguments(arguments)
