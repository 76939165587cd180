"""What R replicas save, any other number of replicas loads, and goes on as if never stopped."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from combinations import covering
from replicas import assert_equal_training, data, fit, flat, hierarchical, make_model, state

import keras_moe
from keras_moe.distribute.sharded_variable import ShardedVariable

ADAM = functools.partial(keras.optimizers.Adam, 0.01)


def make(num_replicas, layer=flat):
    return make_model(num_replicas, lambda: [layer(name="mixture")], ADAM)


@functools.cache
def uninterrupted(layer):
    """The histories and states of two times two steps on one device."""
    model = make(0, layer)
    return [(fit(model, epochs=2), state(model)) for _ in range(2)]


@functools.cache
def interrupted(num_replicas, layer):
    """A model after two steps, to be saved, and the history."""
    model = make(num_replicas, layer)
    return model, fit(model, epochs=2)


def keras_file(model, new, folder):
    model.save(folder / "model.keras")
    with new.distribute_strategy.scope():
        return keras.models.load_model(folder / "model.keras")


def weight_file(model, new, folder):
    model.save_weights(folder / "model.weights.h5")
    new.load_weights(folder / "model.weights.h5")
    return new


def sealed_weight_file(model, new, folder):
    keras_moe.save_weights(model, folder / "model.weights.h5")
    keras_moe.load_weights(new, folder / "model.weights.h5")
    return new


def checkpoint(model, new, folder):
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(folder / "checkpoint")
    tf.train.Checkpoint(model=new, optimizer=new.optimizer).restore(path).assert_consumed()
    return new


CASES = [
    (2, 1, flat, sealed_weight_file),
    (2, 4, flat, checkpoint),
    (0, 2, flat, weight_file),
    (2, 0, hierarchical, keras_file),
    pytest.param(4, 1, flat, keras_file, marks=pytest.mark.exhaustive),
    pytest.param(4, 2, flat, checkpoint, marks=pytest.mark.exhaustive),
    pytest.param(4, 8, flat, sealed_weight_file, marks=pytest.mark.exhaustive),
    pytest.param(2, 4, flat, weight_file, marks=pytest.mark.exhaustive),
    pytest.param(0, 4, flat, checkpoint, marks=pytest.mark.exhaustive),
]


@pytest.mark.parametrize(("before", "after", "layer", "hand_over"), CASES)
def test_training_goes_on(before, after, layer, hand_over, tmp_path):
    first, second = uninterrupted(layer)
    model, history = interrupted(before, layer)
    assert_equal_training((history, state(model)), first)
    new = make(after, layer)
    with new.distribute_strategy.scope():
        new.optimizer.build(new.trainable_variables)
    new = hand_over(model, new, tmp_path)
    for loaded, expected in zip(state(new), state(model), strict=True):
        np.testing.assert_array_equal(loaded, expected)
    assert_equal_training((fit(new, epochs=2), state(new)), second)


def test_an_interrupted_fit_is_restored(tmp_path):
    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def run(num_replicas, callbacks):
        model = make(num_replicas)
        backup = keras.callbacks.BackupAndRestore(tmp_path)
        arguments = {"batch_size": 16, "epochs": 4, "shuffle": False, "verbose": 0}
        return model, model.fit(*data(), callbacks=[backup, *callbacks], **arguments)

    with pytest.raises(KeyboardInterrupt):
        run(2, [Interrupt()])
    model, history = run(0, [])
    assert_equal_training((history.history, state(model)), uninterrupted(flat)[1])


def test_a_file_holds_all_experts_once(tmp_path):
    model, _ = interrupted(2, flat)
    path = tf.train.Checkpoint(model=model, optimizer=model.optimizer).save(tmp_path / "checkpoint")
    shapes = {tuple(s) for k, s in tf.train.list_variables(path) if len(s) == 3}
    assert shapes == {(8, 4, 5), (8, 5, 4)}
    # Two kernels, each with two slots.
    assert sum(len(shape) == 3 for _, shape in tf.train.list_variables(path)) == 6


def export_from_keras(model, path):
    model.export(path, verbose=False)
    return path


@covering(
    layer={"flat": flat, "hierarchical": hierarchical},
    export={"export_from_keras": export_from_keras, "for_serving": keras_moe.export_saved_model},
)
def test_export(export, layer, tmp_path):
    model = make(4, layer)
    x, _ = data()
    expected = model.predict(x, verbose=0)
    with model.distribute_strategy.scope():
        path = export(model, tmp_path / "served")
    fit(model, epochs=1)  # The export has left the model able to train, and has values of its own.
    served = tf.saved_model.load(str(path))
    (y,) = served.signatures["serving_default"](tf.constant(x)).values()
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-6)
    # All rows of a bank are there once, and no shard.
    stored = [tuple(s) for _, s in tf.train.list_variables(str(path / "variables" / "variables"))]
    banks = [v.value for v in model.variables if isinstance(v.value, ShardedVariable)]
    assert len(banks) == {flat: 4, hierarchical: 3}[layer]  # kernels and biases; gating and kernels
    for bank in banks:
        assert stored.count(tuple(bank.shape)) == 1
        assert tuple(bank.shards[0].shape) not in stored
