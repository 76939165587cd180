"""What examples/multi_worker.py does in each worker; the workers are those of the strategy."""

import random
import shutil

import multi_worker
import numpy as np
import tensorflow as tf

from keras_moe.layers import SampledSoftmax

OPTIONS = {
    "vocabulary-size": 60,
    "width": 4,
    "num-experts": 4,
    "hidden-units": 4,
    "k": 2,
    "words-per-batch": 128,
    "num-sampled": 10,
    "warm-up": 2,
    "show-every": 2,
    "save-every": 2,
    "steps": 4,
}


def write_text(path):
    rng = random.Random(0)
    sentences = [
        [f"{rng.choice('abcd')}{rng.choice('efgh')}" for _ in range(6)] for _ in range(100)
    ]
    path.write_text("\n".join(" ".join(words) + "." for words in sentences))


def checkpointed(path):
    reader = tf.train.load_checkpoint(path)
    names = [name for name in reader.get_variable_to_shape_map() if "OBJECT_GRAPH" not in name]
    return {name: reader.get_tensor(name) for name in names}


def test_training_goes_on_from_the_last_checkpoint_as_if_never_stopped(
    tmp_path, capsys, monkeypatch
):
    # The whole softmax, since TensorFlow keeps the state of its sampler to itself.
    monkeypatch.setattr(
        SampledSoftmax, "sampled_loss", lambda self, x, y: -tf.gather(self(x), y, batch_dims=1)
    )
    write_text(tmp_path / "text.txt")

    def train(folder):
        options = {**OPTIONS, "text": tmp_path / "text.txt", "checkpoints": folder}
        arguments = [f"--{name}={value}" for name, value in options.items()]
        multi_worker.train(tf.distribute.get_strategy(), multi_worker.parse_arguments(arguments))
        return capsys.readouterr().out

    whole, broken_off = tmp_path / "whole", tmp_path / "broken_off"
    assert "going on" not in train(whole)
    broken_off.mkdir()
    for path in whole.glob("ckpt-2.*"):
        shutil.copy(path, broken_off)
    (broken_off / "checkpoint").write_text('model_checkpoint_path: "ckpt-2"')
    output = train(broken_off)
    assert f"going on from {broken_off / 'ckpt-2'}" in output
    assert "step      4" in output and "step      2" not in output
    assert float(output.split()[-1]) < 60  # perplexity

    got, expected = checkpointed(broken_off / "ckpt-4"), checkpointed(whole / "ckpt-4")
    earlier = checkpointed(whole / "ckpt-2")
    assert any(np.any(earlier[name] != expected[name]) for name in expected)
    for name in expected.keys() - {"save_counter/.ATTRIBUTES/VARIABLE_VALUE"}:
        np.testing.assert_allclose(got[name], expected[name], 1e-4, 1e-6, err_msg=name)
