"""Weak scaling of expert parallelism: measured on logical CPUs, and planned for up to 4096 devices.

    python benchmarks/scaling.py                  # both
    python benchmarks/scaling.py --plan           # the plan alone, at once
    python benchmarks/scaling.py --json FILE      # the measurements also as JSON

Measured: R = 1, 2, 4, 8 replicas of a `MirroredStrategy` hold 8 experts each and have as many rows
each. What replicas send each other by all-to-all in a training step is counted while the step runs,
and so are the rows that the experts compute. The formulas beside it know the numbers of rows that
NumPy has counted for every pair of replicas, and that every row travels four times: to its expert,
back as a result, and both ways again as a gradient. One part in R of what a replica sends stays
where it is. The seconds tell little: all replicas share the cores of one machine.

Planned: see `scaling_plan.py`.
"""

import argparse
import contextlib
import itertools
import json
import math
import pathlib
import subprocess
import sys
import time
import types
from typing import NamedTuple
from unittest import mock

import keras
import numpy as np
import scaling_plan
import tensorflow as tf
from tensorflow.python.ops import control_flow_util_v2

from keras_moe import FeedForwardExperts, NoisyTopKGating, SparseMoE
from keras_moe.backend.tensorflow import collectives
from keras_moe.backend.tensorflow import replicas as internals
from keras_moe.distribute import ExpertParallel

REPLICAS = (1, 2, 4, 8)
EXPERTS_PER_REPLICA, K = 8, 2
CAPACITY_FACTOR = 1.25
STEPS = 3
MODES = {
    "dropless": "nothing dropped",
    "capacity": f"capacity factor {CAPACITY_FACTOR}",
    "static": f"capacity factor {CAPACITY_FACTOR}, in the static shapes that XLA needs",
}


class Size(NamedTuple):
    """What each replica has.

    Attributes:
        rows: T, the examples.
        width: D.
        hidden_units: F.
    """

    rows: int = 2048
    width: int = 64
    hidden_units: int = 128


class Measured(NamedTuple):
    """One training step.

    Attributes:
        replicas: R.
        experts: N.
        bytes_sent: Bytes of rows that a replica sends by all-to-all.
        bytes_formula: The same, by the formula.
        bytes_of_counts: Bytes of the numbers of rows, that a replica sends before the rows.
        rows_per_expert: Rows that an expert computes on average.
        rows_formula: The same, by the formula.
        seconds: Seconds of a step.
    """

    replicas: int
    experts: int
    bytes_sent: float
    bytes_formula: float
    bytes_of_counts: float
    rows_per_expert: float
    rows_formula: float
    seconds: float


class CountedExperts(FeedForwardExperts):
    """Experts that note how many rows they compute, in each call while the step runs."""

    def __init__(self, *args, on_rows, **kwargs):
        super().__init__(*args, **kwargs)
        self.on_rows = on_rows

    def call(self, rows, rows_per_expert=None, experts=None, training=None):
        def note(rows, rows_per_expert):
            in_places = rows.size // rows.shape[-1] if rows.ndim == 3 else 0
            self.on_rows(int(in_places + rows_per_expert.sum()))

        counts = tf.zeros([1], tf.int32) if rows_per_expert is None else rows_per_expert
        rows = noted(note, rows, counts)
        return super().call(rows, rows_per_expert, experts, training)


_numbers = itertools.count()


def noted(function, x, *others):
    """`x`, and whenever it is computed the function is called with the values of all arguments."""

    def call(number, *values):
        function(*values)
        return np.int32(0)

    # Stateful calls would run in the order in which they were traced: the second replica's after
    # the first's, which wait for the second's all-to-alls. A call without state has to be needed by
    # what follows, and a number of its own keeps it from being taken for another one.
    zero = tf.numpy_function(call, [next(_numbers), x, *others], tf.int32, stateful=False)
    return x + tf.cast(tf.ensure_shape(zero, []), x.dtype)


@contextlib.contextmanager
def counted(sent):
    """Inside, all-to-alls are traced such that each notes its type and bytes when it runs."""
    all_to_all = internals.all_to_all

    def note(x):
        sent.append((bool(np.issubdtype(x.dtype, np.floating)), x.nbytes))

    with mock.patch.object(internals, "all_to_all", lambda x: all_to_all(noted(note, x))):
        yield


@contextlib.contextmanager
def static_shapes():
    """Inside, steps are traced as where XLA compiles, which for CPUs has no all-to-all."""
    compiling = types.SimpleNamespace(compiling=lambda: True)
    with (
        # Only where replicas exchange: elsewhere operations would be traced that XLA alone has.
        mock.patch.object(collectives, "xla", compiling),
        # Nor has XLA frames, by which TensorFlow tells collectives of several loops in a graph
        # apart: those of two replicas would never meet.
        mock.patch.object(control_flow_util_v2, "_DISABLE_LOWER_USING_SWITCH_MERGE", True),
    ):
        yield


def measure(strategy, mode, size):
    """Returns the `Measured` of a training step of a layer.

    Args:
        strategy: A `MirroredStrategy` of R replicas.
        mode: One of `MODES`.
        size: A `Size`.
    """
    num_replicas = strategy.num_replicas_in_sync
    num_experts = EXPERTS_PER_REPLICA * num_replicas
    factor = None if mode == "dropless" else CAPACITY_FACTOR
    rng = np.random.default_rng(0)
    x = rng.normal(size=(num_replicas, size.rows, size.width)).astype("float32")
    kernel = rng.normal(size=(size.width, num_experts)).astype("float32")
    kernel /= np.linalg.norm(kernel, axis=0)  # Otherwise long columns would have more rows.

    sent, computed = [], []
    with strategy.scope():
        gating = NoisyTopKGating(num_experts, K, noise=False)
        experts = CountedExperts(
            num_experts,
            size.hidden_units,
            on_rows=computed.append,
            static_shapes=factor is not None,
            expert_parallel=True,
        )
        layer = SparseMoE(
            num_experts,
            gating=gating,
            experts=experts,
            capacity_factor=factor,
            expert_parallel=True,
        )
        # A layer before it, as in a model, so that gradients go all the way back.
        identity = keras.layers.Dense(size.width, kernel_initializer="identity")
        model = keras.Sequential([keras.Input((size.width,)), identity, layer])
        gating.gate_kernel.assign(kernel)
        model.compile(ExpertParallel(keras.optimizers.SGD(0.0)), "mse")
    batch = strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(x[context.replica_id_in_sync_group])
    )
    step = tf.function(lambda x: strategy.run(model.train_step, ((x, x),)))
    with counted(sent), static_shapes() if mode == "static" else contextlib.nullcontext():
        step(batch)  # Traces, and makes the optimizer's variables.
        step(batch)
    sent.clear()
    computed.clear()
    start = time.perf_counter()
    for _ in range(STEPS):
        step(batch)
    seconds = (time.perf_counter() - start) / STEPS

    places = math.inf if factor is None else capacity(size)
    bytes_sent, bytes_of_counts = (
        sum(number for is_rows, number in sent if is_rows == wanted) / STEPS / num_replicas
        for wanted in (True, False)
    )
    return Measured(
        num_replicas,
        num_experts,
        bytes_sent,
        4 * rows_sent(rows_of_pairs(x, kernel, places), mode, size) * size.width * 4,
        bytes_of_counts,
        sum(computed) / STEPS / num_experts,
        K * size.rows / EXPERTS_PER_REPLICA if factor is None else places,
        seconds,
    )


def capacity(size):
    """C, for any number of replicas with so many rows and experts each."""
    return math.ceil(CAPACITY_FACTOR * K * size.rows / EXPERTS_PER_REPLICA)


def rows_of_pairs(x, kernel, places):
    """How many rows each replica has for each, [R, R].

    Args:
        x: Array [R, T, D].
        kernel: Array [D, N].
        places: C, the most rows of an expert. First choices come first, then earlier replicas.
    """
    num_replicas, num_experts = len(x), kernel.shape[1]
    chosen = np.argsort(-(x @ kernel), axis=-1, kind="stable")[..., :K]
    counts = np.array(
        [
            np.bincount(chosen[replica, :, k], minlength=num_experts)
            for k in range(K)
            for replica in range(num_replicas)
        ]
    )
    earlier = np.cumsum(counts, axis=0) - counts
    kept = np.clip(places - earlier, 0, counts).astype(int)
    return kept.reshape(K, num_replicas, num_replicas, -1).sum(axis=(0, 3))


def rows_sent(pairs, mode, size):
    """The formula: the rows of one all-to-all of a replica, filled up, its own ones included."""
    num_replicas = len(pairs)
    if num_replicas == 1:
        return 0
    if mode != "static":
        return num_replicas * int(pairs.max())  # All pairs have as many as the largest.
    # A quarter of the even share of what an expert's replica may receive, as often as it takes.
    piece = math.ceil(EXPERTS_PER_REPLICA * capacity(size) / (4 * num_replicas))
    return num_replicas * piece * math.ceil(int(pairs.max()) / piece)


def measure_all(size):
    """Measures each number of replicas in a process of its own; returns lists of them by mode."""
    results = {mode: [] for mode in MODES}
    for num_replicas in REPLICAS:
        command = [sys.executable, __file__, "--replicas", str(num_replicas)]
        command += [f"--{name}={number}" for name, number in size._asdict().items()]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        for mode, fields in json.loads(output.splitlines()[-1]).items():
            results[mode].append(Measured(**fields))
    return results


def print_measured(results, size):
    """Prints a table for each mode."""
    print("Weak scaling, measured: " + ", ".join(f"{k} {v}" for k, v in size._asdict().items()))
    for mode, rows in results.items():
        print(f"\n{MODES[mode]}\n")
        print(
            "| replicas | experts | KiB sent per replica | formula | of it to others | "
            "KiB of counts | rows per expert | formula | ms per step |"
        )
        print("|---" * 9 + "|")
        for row in rows:
            others = row.bytes_sent * (row.replicas - 1) / row.replicas
            print(
                f"| {row.replicas} | {row.experts} | {row.bytes_sent / 1024:.0f} | "
                f"{row.bytes_formula / 1024:.0f} | {others / 1024:.0f} | "
                f"{row.bytes_of_counts / 1024:.1f} | {row.rows_per_expert:.0f} | "
                f"{row.rows_formula:.0f} | {row.seconds * 1000:.0f} |"
            )


def main():
    """Measures and prints, or is one of the processes that measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plan", action="store_true", help="print the plan alone")
    parser.add_argument("--json", type=pathlib.Path, help="file to write the measurements to")
    parser.add_argument("--replicas", type=int, help=argparse.SUPPRESS)
    for name, default in Size()._asdict().items():
        parser.add_argument(f"--{name}", type=int, default=default, help="%(default)s")
    args = parser.parse_args()
    size = Size(args.rows, args.width, args.hidden_units)
    if args.replicas:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * args.replicas
        )
        devices = [f"CPU:{i}" for i in range(args.replicas)]
        strategy = tf.distribute.MirroredStrategy(devices)
        print(json.dumps({mode: measure(strategy, mode, size)._asdict() for mode in MODES}))
        return
    if not args.plan:
        results = measure_all(size)
        print_measured(results, size)
        if args.json:
            by_mode = {mode: [row._asdict() for row in rows] for mode, rows in results.items()}
            args.json.write_text(json.dumps(by_mode, indent=1) + "\n")
        print()
    scaling_plan.print_plan()


if __name__ == "__main__":
    main()
