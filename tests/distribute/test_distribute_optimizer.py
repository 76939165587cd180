"""Whatever Keras does with gradients, R replicas do it with whole gradients."""

import functools

import keras
import pytest
from keras.optimizers import SGD
from replicas import assert_equal_training, fit, flat, make_model, state

from keras_moe.distribute import ExpertParallel
from keras_moe.optimizers import FactoredAdam

momentum = functools.partial(SGD, 0.01, momentum=0.9)
schedule = keras.optimizers.schedules.PolynomialDecay(0.1, 3)
CASES = {
    "accumulation, clipnorm": functools.partial(
        momentum, gradient_accumulation_steps=2, clipnorm=0.1
    ),
    "weight decay, clipvalue, ema": functools.partial(
        momentum,
        weight_decay=0.1,
        clipvalue=1e-3,
        use_ema=True,
        ema_momentum=0.5,
        ema_overwrite_frequency=2,
    ),
    "schedule, global_clipnorm": functools.partial(
        SGD, schedule, nesterov=True, momentum=0.5, global_clipnorm=0.1
    ),
    "nadam, ema at the end": functools.partial(
        keras.optimizers.Nadam, 0.01, use_ema=True, ema_momentum=0.5
    ),
}


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_settings(make):
    models = [make_model(n, lambda: [flat(name="mixture")], make) for n in (2, 0)]
    got, expected = [(fit(model, epochs=3), state(model)) for model in models]
    assert_equal_training(got, expected)


def test_configuration():
    optimizer = ExpertParallel(FactoredAdam(0.5, beta_2=0.9, clipnorm=1.0), name="wrapped")
    config = keras.saving.serialize_keras_object(optimizer)
    again = keras.saving.deserialize_keras_object(config)
    assert again.get_config() == optimizer.get_config()
    assert again.inner_optimizer.clipnorm == 1.0 and float(again.learning_rate) == 0.5
    again.learning_rate = 0.25
    assert float(again.inner_optimizer.learning_rate) == 0.25
