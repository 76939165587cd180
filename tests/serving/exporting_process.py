"""Exports to the folder argv[2], forever or argv[3] times, once a line comes in on stdin.

The model answers with argv[1] wherever its input is 1, so that a test can tell whose an export is.
"""

import sys

import keras

import keras_moe

model = keras.Sequential([keras.Input((1,), name="x"), keras.layers.Dense(2**20, use_bias=False)])
model.layers[0].kernel.assign(keras.ops.full((1, 2**20), float(sys.argv[1])))
print("ready", flush=True)
sys.stdin.readline()
left = int(sys.argv[3]) if len(sys.argv) > 3 else float("inf")
while left > 0:
    print(keras_moe.export_saved_model(model, sys.argv[2]), flush=True)
    left -= 1
