"""`FactoredAdam` in all that Keras does with an optimizer: `fit`, precision, files, replicas."""

import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from combinations import usually
from helpers import CROSS_ENTROPY, WIDTH, language_model, next_words
from keras.ops import convert_to_numpy as numpy

import keras_moe
from keras_moe import FeedForwardExperts, NoisyTopKGating
from keras_moe.optimizers import FactoredAdam


def losses_of_fit(model, optimizer, epochs=20, **options):
    x, y = next_words()
    model.compile(optimizer, CROSS_ENTROPY, **options)
    return model.fit(x, y, epochs=epochs, shuffle=False, verbose=0).history["loss"]


def test_a_model_learns_about_as_fast_as_by_adam():
    ours, adams = (
        losses_of_fit(language_model(), optimizer, epochs=60)
        for optimizer in (FactoredAdam(0.01), keras.optimizers.Adam(0.01))
    )
    assert ours[-1] < 0.1 * ours[0]
    assert 0.8 < ours[-1] / adams[-1] < 1.25


@pytest.mark.parametrize("policy", usually(["mixed_bfloat16", "float16"], ["float64", "bfloat16"]))
def test_a_model_learns_in_any_precision(policy):
    losses = losses_of_fit(language_model(policy), optimizer := FactoredAdam(0.03))
    assert losses[-1] < 0.5 * losses[0]
    # The gating is float32 whatever the policy.
    dtypes = {variable.dtype for variable in optimizer.variables[2:]}
    assert dtypes == ({"float32", "float64"} if policy == "float64" else {"float32"})


def test_a_model_learns_with_a_scaled_loss():
    # Of the first steps the gradients overflow in float16: none of them may reach the slots.
    optimizer = keras.optimizers.LossScaleOptimizer(FactoredAdam(0.03), initial_scale=2.0**24)
    losses = losses_of_fit(language_model("mixed_float16"), optimizer, epochs=40)
    assert losses[-1] < 0.5 * losses[0]
    assert float(optimizer.dynamic_scale) < 2.0**24


def test_a_model_learns_under_xla():
    model = language_model(capacity_factor=2.0)
    losses = losses_of_fit(model, FactoredAdam(0.03), jit_compile=True)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("file", ["model.keras", "model.weights.h5"])
def test_training_goes_on_from_a_file(file, tmp_path):
    x, y = next_words()

    def epochs(model, number):
        model.fit(x, y, epochs=number, shuffle=False, verbose=0)
        return [numpy(v) for v in (*model.weights, *model.optimizer.variables)]

    def fresh():
        gating = NoisyTopKGating(8, k=2, noise=False)  # Files do not hold how far the noise is.
        model = language_model(gating=gating, use_bias=True)
        schedule = keras.optimizers.schedules.ExponentialDecay(0.01, 10, 0.9)
        optimizer = FactoredAdam(schedule, weight_decay=0.01)
        model.compile(optimizer, CROSS_ENTROPY, run_eagerly=True)
        return model

    model = fresh()
    epochs(model, 3)
    if file == "model.keras":
        model.save(tmp_path / file)
        other = keras.models.load_model(tmp_path / file)
    else:
        model.save_weights(tmp_path / file)
        other = fresh()
        epochs(other, 1)
        keras_moe.load_weights(other, tmp_path / file)
    assert isinstance(other.optimizer, FactoredAdam)
    for ours, theirs in zip(epochs(model, 3), epochs(other, 3), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_state_of_another_optimizer_is_refused(tmp_path):
    model, other = language_model(), language_model()
    losses_of_fit(model, "adam", epochs=1, run_eagerly=True)
    losses_of_fit(other, FactoredAdam(), epochs=1, run_eagerly=True)
    before = [numpy(v) for v in (*other.weights, *other.optimizer.variables)]
    model.save_weights(tmp_path / "model.weights.h5")
    with pytest.raises(ValueError, match="shape"):
        keras_moe.load_weights(other, tmp_path / "model.weights.h5")
    for now, old in zip((*other.weights, *other.optimizer.variables), before, strict=True):
        np.testing.assert_array_equal(now, old)


def test_a_checkpoint_of_tensorflow_brings_the_state_back(tmp_path):
    bank = FeedForwardExperts(3, 4, use_bias=True)
    bank.build((None, WIDTH))
    optimizer, other = FactoredAdam(), FactoredAdam()
    for each in (optimizer, other):
        each.build(bank.trainable_variables)
    optimizer.apply([tf.ones(v.shape) for v in bank.trainable_variables])
    state = [numpy(variable) for variable in optimizer.variables]
    path = tf.train.Checkpoint(bank=bank, optimizer=optimizer).save(str(tmp_path / "state"))
    tf.train.Checkpoint(bank=bank, optimizer=other).restore(path).assert_consumed()
    for variable, saved in zip(other.variables, state, strict=True):
        np.testing.assert_array_equal(variable, saved)


REPLICAS = """
import keras, numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, 2 * [tf.config.LogicalDeviceConfiguration()])
from helpers import examples
from keras.ops import convert_to_numpy as numpy
from keras_moe import NoisyTopKGating, SparseMoE
from keras_moe.optimizers import FactoredAdam
x = examples(32)
states = []
for strategy in (tf.distribute.get_strategy(), tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])):
    with strategy.scope():
        keras.utils.set_random_seed(0)
        # No balance losses, which are those of each replica's part, and no noise.
        gating = NoisyTopKGating(4, k=2, noise=False)
        weights = {"importance_loss_weight": 0.0, "load_loss_weight": 0.0}
        moe = SparseMoE(4, 8, gating=gating, use_bias=True, **weights)
        model = keras.Sequential([keras.Input(x.shape[1:]), keras.layers.Dense(6), moe])
        model.compile(FactoredAdam(0.01, weight_decay=0.1), "mse")
    before = model.get_weights()
    model.fit(x, np.tanh(x[:, ::-1]), batch_size=16, epochs=3, shuffle=False, verbose=0)
    assert all(np.any(a != b) for a, b in zip(model.get_weights(), before, strict=True))
    states.append([numpy(v) for v in (*model.trainable_weights, *model.optimizer.variables)])
for one, two in zip(*states, strict=True):
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)
print("equal", strategy.num_replicas_in_sync)
"""


def test_two_replicas_do_what_one_does():
    # In a process of its own, since devices are divided before anything else happens.
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", REPLICAS],
        env={"PYTHONPATH": f"{tests}:{tests.parent}", "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["equal", "2"]
