"""Peak memory of a training step with and without `recompute=True`, beside the formula.

    python benchmarks/recompute_memory.py

A stack of `SparseMoE` layers keeps for its backward pass the hidden activations of every layer,
K·T·F floats each. Recomputed, those of one layer exist at a time, so that a stack of L layers saves
(L - 1)·K·T·F floats. Each case runs in a process of its own, whose largest resident memory during
the step (Linux: VmHWM) is compared with that just before it.
"""

import argparse
import pathlib
import re
import subprocess
import sys

import tensorflow as tf

from keras_moe import SparseMoE

LAYERS, EXAMPLES, WIDTH, NUM_EXPERTS, HIDDEN_UNITS, K = 8, 4096, 32, 4, 2048, 2
HIDDEN_BYTES = K * EXAMPLES * HIDDEN_UNITS * 4  # of one layer, float32


def measure(recompute):
    """Bytes by which a training step raises the peak of this process."""
    layers = [SparseMoE(NUM_EXPERTS, HIDDEN_UNITS, K, recompute=recompute) for _ in range(LAYERS)]
    for layer in layers:
        layer.build((None, WIDTH))
    kernels = [kernel.value for layer in layers for kernel in layer.experts.kernels]

    @tf.function(input_signature=[tf.TensorSpec([None, WIDTH])])
    def step(x):
        with tf.GradientTape() as tape:
            for layer in layers:
                x += layer(x, training=True)
            loss = tf.reduce_mean(tf.square(x))
        return [tf.reduce_sum(gradient) for gradient in tape.gradient(loss, kernels)]

    step(tf.random.normal([64, WIDTH]))  # Trace, and touch what every step needs.
    x = tf.random.normal([EXAMPLES, WIDTH])
    before = _peak()
    step(x)
    return _peak() - before


def _peak():
    # Not `resource.getrusage`, which in a new process begins at the peak of its parent.
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024


def main():
    """Prints both cases beside the formula; returns the bytes saved and those of the formula."""
    peaks = {}
    for case in ("stored", "recomputed"):
        command = [sys.executable, __file__, "--case", case]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks[case] = int(output.split()[-1])
        print(f"{case:>10}: {peaks[case] / 2**20:6.0f} MiB above the state before the step")
    saved = peaks["stored"] - peaks["recomputed"]
    formula = (LAYERS - 1) * HIDDEN_BYTES
    print(f"     saved: {saved / 2**20:6.0f} MiB")
    print(f"   formula: {formula / 2**20:6.0f} MiB are (L - 1)·K·T·F floats")
    return saved, formula


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", choices=["stored", "recomputed"], help="one case, bytes alone")
    case = parser.parse_args().case
    if case:
        print(measure(case == "recomputed"))
    else:
        main()
