"""Versions of an export, written by real processes, several at once or killed."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf

from keras_moe.serving import versions

SCRIPT = pathlib.Path(__file__).parent / "exporting_process.py"


@pytest.fixture
def exporting():
    """Starts processes that export, and ends them."""
    processes = []

    def start(*arguments):
        process = subprocess.Popen(
            [sys.executable, SCRIPT, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])},
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def go(process):
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("\n")
    process.stdin.flush()


def answer(version):
    """What an export answers to 1, which has to be the same everywhere."""
    served = tf.saved_model.load(version)
    y = served.signatures["serving_default"](x=tf.ones((1, 1)))["outputs"].numpy()
    assert y.shape == (1, 2**20)
    assert np.all(y == y[0, 0])
    return y[0, 0]


def numbered(path):
    return sorted(int(name) for name in os.listdir(path) if name.isdecimal())


def test_a_killed_export_leaves_the_earlier_versions_alone(exporting, tmp_path):
    process = exporting(3, tmp_path)
    go(process)
    assert process.stdout.readline() == f"{tmp_path / '1'}\n"
    deadline = time.time() + 60
    while time.time() < deadline:
        os.kill(process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        # In the middle: weights are there, the graph, which TensorFlow writes last, is not.
        (unfinished,) = [*tmp_path.glob(".unfinished-*/version/variables")] or [None]
        if unfinished and not (unfinished.parent / "saved_model.pb").exists():
            break
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.002)
    assert unfinished is not None
    before = numbered(tmp_path)
    process.kill()
    process.wait()
    assert numbered(tmp_path) == before
    assert unfinished.exists()
    assert before == [*range(1, len(before) + 1)]
    for version in {before[0], before[-1]}:
        assert answer(tmp_path / str(version)) == 3.0
    again = exporting(4, tmp_path, 1)
    go(again)
    assert again.wait() == 0
    assert numbered(tmp_path) == [*before, len(before) + 1]
    assert answer(tmp_path / str(len(before) + 1)) == 4.0


def test_exports_at_once_get_versions_of_their_own(exporting, tmp_path):
    processes = [exporting(number, tmp_path, 4) for number in (5, 6)]
    for process in processes:
        go(process)
    paths = {n: p.communicate()[0].split() for n, p in zip((5, 6), processes, strict=True)}
    assert [process.returncode for process in processes] == [0, 0]
    assert numbered(tmp_path) == [*range(1, 9)]
    assert sorted(path for written in paths.values() for path in written) == [
        str(tmp_path / str(version)) for version in range(1, 9)
    ]
    for number, written in paths.items():
        assert [answer(path) for path in written] == [number] * 4


def test_who_loses_the_race_takes_the_next_version(tmp_path):
    def write_while_another_is_faster(folder):
        (tmp_path / "1").mkdir()
        (tmp_path / "1" / "theirs").touch()
        os.mkdir(folder)
        pathlib.Path(folder, "ours").touch()

    assert versions.publish(write_while_another_is_faster, tmp_path) == tmp_path / "2"
    assert [*map(os.listdir, (tmp_path / "1", tmp_path / "2"))] == [["theirs"], ["ours"]]
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_a_version_asked_for_is_not_replaced_in_a_race_either(tmp_path):
    def write_while_another_is_faster(folder):
        (tmp_path / "3").mkdir()
        (tmp_path / "3" / "theirs").touch()
        os.mkdir(folder)
        pathlib.Path(folder, "ours").touch()

    with pytest.raises(ValueError, match="never replaced.*version=3"):
        versions.publish(write_while_another_is_faster, tmp_path, 3)
    assert os.listdir(tmp_path) == ["3"]
    assert os.listdir(tmp_path / "3") == ["theirs"]
