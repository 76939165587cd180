"""The notebook runs top to bottom, as plain Python: it has no magics."""

import json
import pathlib
import re

import pytest
from matplotlib import pyplot

NOTEBOOK = pathlib.Path(__file__).parents[2] / "examples" / "quickstart.ipynb"


@pytest.fixture(scope="module")
def cells():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_does_what_it_says(cells, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pyplot.switch_backend("Agg")  # Pictures need no screen.
    monkeypatch.setattr(pyplot, "show", pyplot.close)
    names, printed = {"__name__": "__main__"}, []
    for cell in cells:
        exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), names)
        printed.append(capsys.readouterr().out)
    assert "(4, 10, 16)" in printed[1]
    assert float(re.search(r"difference: (\S+)", printed[3])[1]) < 1e-5
    dense, mixture = map(float, re.search(r"dense (\S+), mixture (\S+)", printed[4]).groups())
    assert mixture < 0.8 * dense
    share = int(re.search(r"examples (\d+)%", printed[5])[1])
    assert share > 30  # An even spread over 16 experts would be 6 %.
    assert printed[6].startswith("GPT2Backbone ")
    at_first, loaded = map(float, printed[6].split()[1:])
    assert at_first < 1e-5 and loaded == 0


def test_the_notebook_comes_with_what_it_prints(cells):
    for cell in cells[1:]:
        assert cell["outputs"], "".join(cell["source"])
        assert all(output["output_type"] != "error" for output in cell["outputs"])
