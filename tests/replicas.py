"""Models that are trained on several replicas, for the tests of expert parallelism."""

import keras
import numpy as np
import tensorflow as tf

from keras_moe import HierarchicalGating, HierarchicalMoE, NoisyTopKGating, SparseMoE
from keras_moe.distribute import ExpertParallel

WIDTH, CLASSES, BATCH = 4, 3, 16


def strategy(num_replicas):
    """A strategy over logical GPUs, if there are as many, else CPUs.

    TensorFlow's own, with one replica, for 0; a strategy as it is.
    """
    if not isinstance(num_replicas, int):
        return num_replicas
    if num_replicas == 0:
        return tf.distribute.get_strategy()
    # TensorFlow expects one strategy in a process: others' collectives would get mixed up. Its own
    # tests part them by this private number.
    tf.distribute.MirroredStrategy._collective_key_base += 1000
    kind = "GPU" if len(tf.config.list_logical_devices("GPU")) >= num_replicas else "CPU"
    return tf.distribute.MirroredStrategy([f"{kind}:{i}" for i in range(num_replicas)])


def flat(**kwargs):
    gating = NoisyTopKGating(8, 2, noise=False)
    return SparseMoE(8, 5, gating=gating, use_bias=True, expert_parallel=True, **kwargs)


def hierarchical(capacity_factor=None, **kwargs):
    gating = HierarchicalGating(
        8,
        2,
        (2, 2),
        noise=False,
        static_shapes=capacity_factor is not None,
        expert_parallel=True,
    )
    kwargs = {
        "gating": gating,
        "capacity_factor": capacity_factor,
        "expert_parallel": True,
        **kwargs,
    }
    return HierarchicalMoE(8, 2, 5, (2, 2), **kwargs)


def make_model(
    num_replicas,
    make_layers,
    make_optimizer=keras.optimizers.SGD,
    metrics=("mae",),
    **compile_arguments,
):
    """A model between two dense layers, with the same random weights for any number of replicas.

    A row of which all entries are 0 is masked. For 0 replicas, what all others are compared with,
    it runs without a graph, which would take longer to trace than all its steps.
    """
    compile_arguments = {"run_eagerly": num_replicas == 0, **compile_arguments}
    keras.backend.clear_session()
    with strategy(num_replicas).scope():
        model = keras.Sequential([keras.Input((None, WIDTH)), keras.layers.Masking()])
        for layer in [keras.layers.Dense(WIDTH), *make_layers(), keras.layers.Dense(CLASSES)]:
            model.add(layer)
        rng = np.random.default_rng(0)
        for weight in model.weights:
            weight.assign(0.5 * rng.normal(size=weight.shape))
        optimizer = ExpertParallel(make_optimizer())
        model.compile(optimizer, "mse", metrics=list(metrics), **compile_arguments)
    return model


def data(number=BATCH):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(number, 2, WIDTH)).astype("float32")
    x[::2, 1] = 0.0  # As many on each replica: Keras takes the mean over replicas' mean losses.
    return x, rng.normal(size=(number, 2, CLASSES)).astype("float32")


def fit(model, epochs=5):
    return model.fit(*data(), batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0).history


def state(model):
    """All weights and all slots, in the order of the model's and its optimizer's variables."""
    variables = [*model.weights, *model.optimizer.variables]
    return [np.asarray(variable) for variable in variables]


def assert_equal_training(got, expected, rtol=1e-4):
    """Compares pairs of a history and a state."""
    assert got[0].keys() == expected[0].keys()
    for name in expected[0]:
        np.testing.assert_allclose(got[0][name], expected[0][name], rtol, err_msg=name)
    for x, y in zip(got[1], expected[1], strict=True):
        np.testing.assert_allclose(x, y, rtol, atol=1e-6)
