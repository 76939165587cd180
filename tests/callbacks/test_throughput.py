"""The speed of training in the logs, by a clock that the test sets."""

import time

import keras
import numpy as np
import pytest

from keras_moe.callbacks import Throughput


def logs_of(callback, monkeypatch, *epochs):
    """The logs of epochs: each a time at which it begins, then {last step of a batch end: time}."""
    logs = []
    for begin, ends in epochs:
        monkeypatch.setattr(time, "perf_counter", lambda begin=begin: begin)
        callback.on_epoch_begin(len(logs))
        for step, end in ends.items():
            monkeypatch.setattr(time, "perf_counter", lambda end=end: end)
            callback.on_train_batch_end(step, {})
        monkeypatch.setattr(time, "perf_counter", lambda: 1e6)  # Validation takes its time.
        logs.append({"loss": 1.0})
        callback.on_epoch_end(len(logs), logs[-1])
    return logs


def test_words_and_operations_per_second(monkeypatch):
    callback = Throughput(8e6, words_per_step=3e5, softmax_ops_per_timestep=2e6, num_devices=16)
    # Two steps in 4 seconds after a slow first one, and then 3 in 3 seconds.
    first, second = logs_of(
        callback, monkeypatch, (0, {0: 90, 1: 93, 2: 94}), (200, {0: 203, 1: 204, 2: 205, 3: 206})
    )
    assert first["words_per_second"] == 3e5 * 2 / 4
    assert second["words_per_second"] == 3e5 * 3 / 3
    # 10 million multiply-adds, twice as many in the backward pass, two operations each: 60 million
    # per word; 150,000 and 300,000 words a second on 16 devices.
    np.testing.assert_allclose(first["tflops_per_device"], 60e6 * 150e3 / 16 / 1e12)
    np.testing.assert_allclose(second["tflops_per_device"], 60e6 * 300e3 / 16 / 1e12)
    assert first["loss"] == 1.0


def test_several_steps_in_one_execution(monkeypatch):
    # Ends of steps 4, 8 and 10: the last 6 took 3 seconds.
    (logs,) = logs_of(Throughput(1, 100), monkeypatch, (0, {3: 50, 7: 52, 9: 53}))
    assert logs["words_per_second"] == 100 * 6 / 3


def test_an_epoch_of_one_step_is_timed_whole(monkeypatch):
    (logs,) = logs_of(Throughput(1, 100), monkeypatch, (10, {0: 14}))
    assert logs["words_per_second"] == 25


def test_the_history_of_fit_shows_the_speed():
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    x = np.ones((6, 2))
    start = time.perf_counter()
    speed = Throughput(2, words_per_step=2)
    history = model.fit(x, x[:, :1], batch_size=2, epochs=2, verbose=0, callbacks=[speed]).history
    seconds = time.perf_counter() - start
    for words, tflops in zip(
        history["words_per_second"], history["tflops_per_device"], strict=True
    ):
        assert words > 2 * 2 / seconds  # two of an epoch's steps took less than all of `fit`
        np.testing.assert_allclose(tflops, 12 * words / 1e12)


@pytest.mark.parametrize(
    "settings",
    [
        {"ops_per_timestep": 0},
        {"words_per_step": -1},
        {"softmax_ops_per_timestep": -1},
        {"num_devices": 0},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings):
    (name, value), *_ = settings.items()
    with pytest.raises(ValueError, match=f"`{name}` must be .*Received: {value}"):
        Throughput(**{"ops_per_timestep": 1, "words_per_step": 1, **settings})
