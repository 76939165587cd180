"""The benchmark of graphics cards runs from the command line to the tables, here without a card."""

import importlib
import sys

import gpu
import gpu_contenders
import gpu_measure
import gpu_profile
import measure
import pytest
from cases import Case
from contenders import TENSORFLOW

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")


def test_the_tables_hold_what_was_measured(tmp_path, capsys):
    outcomes = gpu.main(
        ["--small", "--cases", "1", "--contenders", "keras_moe", "--output", str(tmp_path)]
    )
    ((case, found),) = outcomes.items()
    assert set(found) == {"dense", "keras_moe"}
    assert found["dense"].failure is found["keras_moe"].failure is None
    # 4·512 rows through 64→128→64 are 2·2·2048·64·128 operations, and backward twice as many.
    assert case.operations == 3 * 67_108_864
    middle = sorted(found["keras_moe"].seconds)[2]
    assert len(found["keras_moe"].seconds) == 5
    table = (tmp_path / "gpu.md").read_text()
    ratio = middle / sorted(found["dense"].seconds)[2]
    expected = (
        f"| keras_moe | {1000 * middle:.3g} ms | {ratio:.2f} | {201.326592e-6 / middle:.3g} |"
    )
    assert expected in table
    assert table.strip() == capsys.readouterr().out.strip()
    assert (tmp_path / "gpu.png").stat().st_size > 0


def test_a_share_is_of_the_rate_of_the_dtype():
    # 4·8 rows through 2→2→2 are 2·2·32·2·2 = 512 operations. In 2 s: half of 512 a second.
    case = Case(2, 4, 8, "forward", width=2, hidden_units=2, dtype="mixed_bfloat16")
    outcome = measure.Outcome(seconds=[1.0, 2.0, 5.0])
    assert gpu.share(case, outcome, {"bfloat16": 512.0, "float32": 1.0}) == 0.5


def test_without_a_card_only_a_rehearsal_runs(monkeypatch, tmp_path):
    def measured(jobs, seconds):
        yield next(iter(jobs)), 1.0, "CPU", {}

    monkeypatch.setattr(gpu, "measure", measured)
    with pytest.raises(SystemExit, match="TensorFlow has no graphics card here.*--small"):
        gpu.main(["--output", str(tmp_path)])


def test_an_interrupted_run_tells_what_was_measured(monkeypatch, tmp_path):
    def measured(jobs, seconds):
        found = {"dense": measure.Outcome(seconds=[0.125])}
        yield next(iter(jobs)), 1.0, "CPU", found
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "measure", measured)
    gpu.main(["--small", "--output", str(tmp_path)])
    assert "| dense | 125 ms | 1.00 |" in (tmp_path / "gpu.md").read_text()


def test_a_contender_that_fails_says_why_and_the_others_are_measured():
    absent = measure.Contender("absent", TENSORFLOW, "dense", options={"no_such_option": 1})
    case = Case(4, 2, 8, "forward", width=8, hidden_units=8)
    job = gpu_measure.Job(case, "TensorFlow", [absent, gpu_contenders.LAYERS[0]])
    first, (same, rate, card, outcomes) = gpu_measure.measure([job], 60)
    assert (same, card) == (job, "CPU") and rate > 0
    assert first == (job, rate, card, {"absent": outcomes["absent"]})  # Known already.
    assert "no_such_option" in outcomes["absent"].failure
    assert outcomes["dense"].failure is None and outcomes["dense"].peak_bytes > 0


def test_a_framework_that_is_missing_leaves_the_others_alone():
    absent = measure.Contender("absent", "no_such_module", "make")
    case = Case(4, 2, 8, width=8, hidden_units=8)
    jobs = [gpu_measure.Job(case, "TensorFlow", [absent]) for _ in range(2)]
    results = list(gpu_measure.measure(jobs, 60))
    assert [rate for _, rate, _, _ in results] == [None, None]
    for *_, outcomes in results:
        assert outcomes["absent"].failure == "not installed: no_such_module"


def test_no_job_begins_when_the_time_is_over():
    absent = measure.Contender("absent", "no_such_module", "make")
    job = gpu_measure.Job(Case(4, 2, 8), "TensorFlow", [absent])
    assert list(gpu_measure.measure([job], seconds=-1)) == []


def test_the_contenders_of_tensorflow_exist():
    module = importlib.import_module(TENSORFLOW)
    for contender in [*gpu_contenders.LAYERS, *gpu_contenders.STEPS]:
        assert contender.module != TENSORFLOW or hasattr(module, contender.function)


def test_a_recording_is_summed_up_by_operation():
    # Two steps of 3 ms: events at 0-2 and 1-3 ms overlap, then a gap of 1 ms, then 4-6 ms.
    eigen = "void Eigen::internal::EigenMetaKernel<Eigen::internal::scalar_max_op<bf16, bf16>>"
    events = [
        gpu_profile.Event("relu:Relu", eigen, 1e6, 2e6),
        gpu_profile.Event("", "MemcpyD2H", 4e6, 2e6),
        gpu_profile.Event("relu:Relu", eigen, 0.0, 2e6),
    ]
    summary = gpu_profile.summarize(events, steps=2)
    assert (summary.span, summary.busy) == (3.0, 2.5)
    assert summary.counts == {"kernel": 2, "memcpyd2h": 1}
    assert summary.operations == {
        ("relu:Relu", "Eigen: scalar_max_op"): 2.0,
        ("", "MemcpyD2H"): 1.0,
    }
    assert "| 2.000 | relu:Relu | Eigen: scalar_max_op |" in list(gpu_profile.describe(summary))
