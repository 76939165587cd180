"""Time of one update of a bank of experts by `FactoredAdam` and by Keras' Adam.

    python benchmarks/optimizer_update.py

The bank holds 256 matrices of 512 x 1024, its gradient is at hand. Rounds of all cases take turns,
so that whatever else the machine does meets all of them; of each case the fastest and the median
round are printed, and the bytes that its state takes.
"""

import statistics
import time

import keras
import tensorflow as tf

from keras_moe.optimizers import FactoredAdam

BANK, ROUNDS = (256, 512, 1024), 15


def make_update(optimizer, jit_compile):
    """A function from the gradient of a bank to nothing; and the bytes of the optimizer's slots."""
    bank = keras.Variable(tf.zeros(BANK), name="bank")
    bank.expert_rank = 2
    optimizer.build([bank])
    slots = sum(variable.value.shape.num_elements() * 4 for variable in optimizer.variables[2:])

    @tf.function(jit_compile=jit_compile, autograph=False, reduce_retracing=True)
    def update(gradient):
        optimizer.apply([gradient])

    return update, slots


def main():
    """Prints one line for each optimizer, plain and compiled by XLA."""
    gradient = tf.random.normal(BANK)
    cases = {
        f"{kind.__name__}{', XLA' if jit_compile else ''}": make_update(kind(), jit_compile)
        for jit_compile in (False, True)
        for kind in (FactoredAdam, keras.optimizers.Adam)
    }
    for update, _ in cases.values():
        update(gradient)  # Trace and compile.
    seconds = {name: [] for name in cases}
    for _ in range(ROUNDS):
        for name, (update, _) in cases.items():
            start = time.perf_counter()
            update(gradient)
            seconds[name].append(time.perf_counter() - start)
    for name, (_, slots) in cases.items():
        fastest, median = (1e3 * f(seconds[name]) for f in (min, statistics.median))
        print(f"{name:>18}: {fastest:4.0f} ms, median {median:4.0f} ms; slots {slots:13,} bytes")


if __name__ == "__main__":
    main()
