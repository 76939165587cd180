"""Processes, each with a part of the experts, train as one does, and end when one of them dies."""

import functools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf
from multi_worker_process import STEPS, Training, noise
from replicas import assert_equal_training, state, strategy

import keras_moe
from keras_moe.backend.tensorflow import replicas as internals

WORKER = pathlib.Path(__file__).with_name("multi_worker_process.py")
TESTS = WORKER.parents[1]
# Seconds: from the death of a worker to the end of the others; and for all that is before it.
TIME_OUT, PATIENCE = 120, 600


class Workers:
    """Processes on this machine.

    Args:
        number: R.
        folder: Where they put their results.
        arguments: More for their command line.
    """

    def __init__(self, number, folder, *arguments):
        self.folder = folder
        sockets = [socket.create_server(("localhost", 0)) for _ in range(number)]
        addresses = [f"localhost:{one.getsockname()[1]}" for one in sockets]
        for one in sockets:
            one.close()
        self.processes = []
        for index in range(number):
            task = {"type": "worker", "index": index}
            environment = {
                **os.environ,
                "TF_CONFIG": json.dumps({"cluster": {"worker": addresses}, "task": task}),
                "CUDA_VISIBLE_DEVICES": "-1",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
            }
            command = [sys.executable, WORKER, folder, *arguments]
            with open(folder / f"{index}.log", "w") as log:
                process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            self.processes.append(process)

    def wait(self, pattern):
        """Waits for a file of every worker."""
        deadline = time.time() + PATIENCE
        while len(list(self.folder.glob(pattern))) < len(self.processes):
            failed = [p.poll() for p in self.processes] != [None] * len(self.processes)
            assert not failed and time.time() < deadline, self.logs()
            time.sleep(0.2)

    def statuses(self):
        """The exit statuses of all, within the time-out."""
        deadline = time.time() + TIME_OUT
        return [process.wait(max(deadline - time.time(), 0)) for process in self.processes]

    def logs(self):
        """The end of each one's output."""
        return "\n".join((self.folder / f"{i}.log").read_text()[-3000:] for i in self._indices())

    def results(self, name):
        """Each one's arrays."""
        results = []
        for i in self._indices():
            with np.load(self.folder / f"{i}.{name}.npz") as arrays:
                results.append(dict(arrays))
        return results

    def _indices(self):
        return range(len(self.processes))

    def kill(self):
        """Ends whoever is left."""
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Four workers after the death of the first, the chief, and what became of the others."""
    workers = Workers(4, tmp_path_factory.mktemp("four"))
    try:
        workers.wait("*.ready")
        chief = workers.processes[0]
        chief.send_signal(signal.SIGKILL)
        workers.statuses()
        yield workers
    finally:
        workers.kill()


@pytest.fixture(scope="module")
def two(four, tmp_path_factory):
    """Two workers that went on from the checkpoint of the four, until one read experts alone."""
    workers = Workers(2, tmp_path_factory.mktemp("two"), four.folder)
    try:
        workers.wait("*.trained_on.npz")
        workers.statuses()
        yield workers
    finally:
        workers.kill()


@functools.cache
def one():
    """The training of one process; its losses and state after the same steps."""
    training = Training(0)
    return training, training.train(STEPS), state(training.model)


@pytest.fixture(params=["two", "four"])
def workers(request):
    return request.getfixturevalue(request.param)


def as_training(result):
    """A pair of a history and a state."""
    losses, *values = result.values()
    return {"loss": losses}, values


def test_workers_train_as_one_process(workers):
    _, losses, values = one()
    for result in workers.results("state"):
        assert_equal_training(as_training(result), ({"loss": losses}, values))


def test_each_worker_holds_its_part_of_the_experts_and_their_slots(workers):
    parts = workers.results("held")
    assert len(parts[0]) == 4 * 3  # two kernels and two biases, each with two moments
    training, _, values = one()
    variables = [*training.model.weights, *training.model.optimizer.variables]
    whole = {v.path: value for v, value in zip(variables, values, strict=True)}
    for name in parts[0]:
        for part in parts:
            assert len(parts) * part[name].nbytes == whole[name].nbytes
        rows = np.concatenate([part[name] for part in parts])
        np.testing.assert_allclose(rows, whole[name], rtol=1e-4, atol=1e-6)


def test_noise_differs_from_worker_to_worker_and_repeats(workers):
    drawn = np.concatenate([result["arr_0"] for result in workers.results("noise")], axis=1)
    number = drawn.shape[1]
    assert number == len(workers.processes)
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) == 2 * number  # two steps
    # The same as the replicas of one process.
    np.testing.assert_array_equal(drawn, noise(strategy(number)))


def test_the_first_worker_alone_is_the_chief(workers):
    chiefs = [bool(result["arr_0"]) for result in workers.results("chief")]
    assert chiefs == [True] + [False] * (len(workers.processes) - 1)


def test_the_weight_file_holds_all_experts(workers):
    training = Training(0)
    keras_moe.load_weights(training.model, workers.folder / "model.weights.h5")
    weights = training.model.get_weights()
    for got, expected in zip(weights, one()[2], strict=False):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_the_death_of_a_worker_ends_the_others_with_an_error(four):
    first, *others = four.statuses()
    assert first == -signal.SIGKILL
    assert all(status not in (0, -signal.SIGKILL) for status in others), others


def test_the_last_checkpoint_is_restored_in_one_process_and_in_two(four, two):
    training = Training(0)
    steps = training.restore(four.folder)
    assert steps >= STEPS
    for result in two.results("restored"):
        assert result.pop("arr_0") == steps
        for got, expected in zip(result.values(), state(training.model), strict=True):
            np.testing.assert_array_equal(got, expected)
    uninterrupted = one()[0]
    uninterrupted.train(steps - int(uninterrupted.model.optimizer.iterations))
    expected = {"loss": uninterrupted.train(2)}, state(uninterrupted.model)
    got = {"loss": training.train(2)}, state(training.model)
    assert_equal_training(got, expected)
    for result in two.results("trained_on"):
        assert_equal_training(as_training(result), expected)


def test_a_worker_that_reads_experts_alone_is_told(two):
    assert all(status not in (0, None) for status in two.statuses())
    assert "RuntimeError: Workers hold a part of the rows each" in two.logs()


def test_ranks_are_in_the_order_of_names():
    class Strategy:
        class extended:
            worker_devices = ("CPU:0",)

        cluster_resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
            tf.train.ClusterSpec({"worker": [f"localhost:{i}" for i in range(12)]})
        )

    # What 12 processes have shown. Sorted: task:0, task:1, task:10, task:11, task:2, ..., task:9.
    assert internals._ranks(Strategy) == [0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 2, 3]


def test_rows_find_replicas_whose_ranks_are_others(monkeypatch):
    # Device i of three has rank i, and is made replica 0, 2 and 1 here: replica 1 has rank 2.
    ids = [0, 2, 1]
    monkeypatch.setattr(internals, "_ranks", lambda strategy: [0, 2, 1])
    three = strategy(3)

    @tf.function
    def send():
        def of_replica():
            mine = tf.constant(ids)[internals.local_replica()]
            return internals.all_to_all(10 * mine + tf.range(3))  # to replica r: "mine, r"

        return three.run(of_replica).values

    for mine, received in zip(ids, send(), strict=True):
        np.testing.assert_array_equal(received, [mine, 10 + mine, 20 + mine])
