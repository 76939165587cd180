"""Latency of an exported mixture beside an exported pair of dense layers, without keras_moe.

    python benchmarks/latency.py
    python benchmarks/latency.py --experts 256 --rows 1 4 --seconds 5

A `SparseMoE` of experts 512→1024→512, K = 4, and two dense layers 512→4096→512 are exported, then
loaded by a process that has TensorFlow alone, and called in turn. A call has other rows than the
one before, or the same: a new row goes to other experts, whose weights no cache holds. So there are
as many dense pairs, with weights of their own, as make 1 GiB: "dense" is one of them, called again
and again, and "dense from memory" all of them in turn.
"""

import argparse
import itertools
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import tensorflow as tf

WIDTH, HIDDEN_UNITS, K = 512, 1024, 4
PAIRS = 64  # of 2·512·4096 numbers in float32: 16 MiB each
DENSE, FROM_MEMORY = "dense", "dense from memory"


def export(num_experts, quantized, folder):
    """Exports a mixture, or with 0 experts the dense pair."""
    import keras

    import keras_moe

    keras.utils.set_random_seed(0)
    if num_experts == 0:
        layers = [
            keras.layers.Dense(K * HIDDEN_UNITS, "relu", use_bias=False),
            keras.layers.Dense(WIDTH, use_bias=False),
        ]
    else:
        layers = [keras_moe.SparseMoE(num_experts, HIDDEN_UNITS, K)]
    model = keras.Sequential([keras.Input((WIDTH,), name="x"), *layers])
    if num_experts:
        # Columns of equal length: experts are chosen about equally often.
        kernel = np.random.default_rng(0).normal(size=(WIDTH, num_experts))
        layers[0].gating.gate_kernel.assign(kernel / np.linalg.norm(kernel, axis=0))
    if quantized:
        layers[0].experts.quantize("int8")
    keras_moe.export_saved_model(model, folder, version=1)


def measure(folders, rows, seconds):
    """Prints a line for each number of rows: dense in ms, the mixtures as multiples of both."""
    folders = dict(folder.split("@") for folder in folders)
    dense = folders.pop(DENSE)
    pairs = [_load(dense) for _ in range(PAIRS)]
    mixtures = {name: _load(folder) for name, folder in folders.items()}
    for function in (*pairs, *mixtures.values()):
        function(x=tf.zeros([1, WIDTH]))  # First calls are slow.
    first, pairs = pairs[0], itertools.cycle(pairs)
    functions = {DENSE: lambda: first, FROM_MEMORY: lambda: next(pairs)}
    functions |= {name: lambda mixture=mixture: mixture for name, mixture in mixtures.items()}
    for number in rows:
        x = np.random.default_rng(1).normal(size=(max(64 // number, 2), number, WIDTH))
        batches = [tf.constant(batch, tf.float32) for batch in x]
        for again in (True, False):
            turns = _turns(functions, batches[:1] if again else batches, number, seconds)
            cells = [f"{number:5}", "same rows" if again else "new rows "]
            for name, taken in turns.items():
                times = [statistics.median(turn) for turn in taken]
                cells.append(f"{name} {1000 * statistics.median(times):.3g} ms")
                for base in (DENSE, FROM_MEMORY) if name in mixtures else ():
                    ratios = [
                        statistics.median(ours) / statistics.median(theirs)
                        for ours, theirs in zip(taken, turns[base], strict=True)
                    ]
                    cells.append(f"{statistics.median(ratios):.2f} × {base}")
            print("; ".join(cells), flush=True)


def _load(folder):
    return tf.saved_model.load(folder).signatures["serving_default"]


def _turns(functions, batches, number, seconds):
    """Lists of the seconds of each call, a list for each turn; all take turns."""
    batches, turns = itertools.cycle(batches), {name: [] for name in functions}
    calls = 10 if number <= 16 else 2
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(turns[DENSE]) < 4:
        for name, function in functions.items():
            turn = []
            for _ in range(calls + 1):
                call, x = function(), next(batches)
                start = time.perf_counter()
                call(x=x)["outputs"].numpy()
                turn.append(time.perf_counter() - start)
            turns[name].append(turn[1:])  # The first call meets the caches of another contender.
    return {name: taken[1:] for name, taken in turns.items()}


def main():
    """Exports, and measures in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 4096])
    parser.add_argument("--seconds", type=float, default=4, help="of measuring, for each line")
    parser.add_argument("--int8", action="store_true", help="also measure experts in int8")
    parser.add_argument("--export", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.export:
        num_experts, quantized, folder = args.export
        return export(int(num_experts), quantized == "int8", folder)
    if args.measure:
        return measure(args.measure, args.rows, args.seconds)
    with tempfile.TemporaryDirectory() as root:
        run = [sys.executable, __file__]
        for num_experts in args.experts:
            wanted = {DENSE: (0, "float32"), f"N={num_experts}": (num_experts, "float32")}
            if args.int8:
                wanted[f"N={num_experts} int8"] = (num_experts, "int8")
            folders = []
            for name, (number, dtype) in wanted.items():
                folder = pathlib.Path(root, f"{number}_{dtype}")
                if not folder.exists():
                    subprocess.run([*run, "--export", str(number), dtype, folder], check=True)
                folders.append(f"{name}@{folder / '1'}")
            options = ["--rows", *map(str, args.rows), "--seconds", str(args.seconds)]
            subprocess.run([*run, *options, "--measure", *folders], check=True)


if __name__ == "__main__":
    main()
