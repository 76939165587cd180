"""A capacity of the experts: who finds a place, and what becomes of those who don't."""

import keras
import numpy as np
import pytest
from combinations import few_in_jax
from helpers import (
    CROSS_ENTROPY,
    WIDTH,
    assert_agrees,
    call_and_gradients,
    examples,
    language_model,
    metrics,
    next_words,
    run,
    with_random_weights,
)
from keras import ops

from keras_moe import (
    HierarchicalGating,
    HierarchicalMoE,
    NoisyTopKGating,
    SparseMoE,
    StrictlyBalancedGating,
)

pytestmark = pytest.mark.covering

MASK = np.random.default_rng(2).random(24) < 0.7


# Without noise, since under XLA it is another stream of random numbers.
def flat(**kwargs):
    gating = NoisyTopKGating(5, k=2, noise=False)
    return with_random_weights(SparseMoE(5, 4, gating=gating, output_dim=3, **kwargs))


def hierarchical(**kwargs):
    gating = HierarchicalGating(3, 2, k=(2, 1), noise=False, static_shapes=True)
    return with_random_weights(HierarchicalMoE(3, 2, 4, gating=gating, **kwargs))


def balanced(**kwargs):
    gating = StrictlyBalancedGating(5, k=2, static_shapes=True)
    layer = with_random_weights(SparseMoE(5, 4, gating=gating, **kwargs))
    layer.gating.thresholds.assign([0.1, 0.2, 0.05, 0.3, 0.15])
    return layer


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("factor", [0.3, 1.0, 9.0])
@pytest.mark.parametrize("make", [flat, hierarchical])
def test_training_agrees_with_the_oracle(make, factor, mask):
    expected = assert_agrees(make(capacity_factor=factor), examples(), training=True, mask=mask)
    least, most = {0.3: (0.5, 0.7), 1.0: (0.01, 0.3), 9.0: (0.0, 0.0)}[factor]
    assert least <= expected.fraction_dropped <= most


@pytest.mark.parametrize("training", [False, None])
@pytest.mark.parametrize("make", [flat, hierarchical])
def test_evaluation_drops_nothing(make, training):
    expected = assert_agrees(make(capacity_factor=0.3), examples(), training=training, mask=MASK)
    assert expected.fraction_dropped == 0.0


@pytest.mark.parametrize("gating", ["noisy_top_k", "softmax"])
def test_noise_and_dense_gating_agree_with_the_oracle(gating):
    layer = SparseMoE(5, 4, k=2, gating=gating, capacity_factor=0.6, use_bias=True, seed=3)
    assert_agrees(with_random_weights(layer), examples(), training=True, mask=MASK)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("way", ["graph, any batch", "xla, any batch"])
@pytest.mark.parametrize("make", [flat, hierarchical, balanced])
def test_compiled_agrees_with_the_oracle(make, way, training):
    layer = make(capacity_factor=0.7)
    assert_agrees(layer, examples(), training=training, mask=MASK, way=way)


@pytest.mark.parametrize(
    ("make", "way"), [(flat, "graph"), (flat, "xla"), (hierarchical, "graph"), (balanced, "xla")]
)
def test_compiled_for_one_batch_size_agrees_with_the_oracle(make, way):
    layer = make(capacity_factor=0.7, num_shared_experts=1, activation="swiglu", recompute=True)
    assert_agrees(layer, examples(), training=True, way=way)


class Constants(keras.layers.Layer):
    """A bank whose experts answer 1, 10 and 100 to every row."""

    num_experts = 3

    def call(self, rows, rows_per_expert=None):
        answers = ops.convert_to_tensor([1.0, 10.0, 100.0])
        if rows_per_expert is None:
            return ops.ones_like(rows[..., :1]) * answers[:, None, None]
        return ops.repeat(answers, rows_per_expert)[:, None]

    def compute_output_shape(self, rows_shape, rows_per_expert_shape=None):
        return (*rows_shape[:-1], 1)


def answers(choices, mask=None, **kwargs):
    """The outputs of experts that answer 1, 10 and 100, with gates 3/4 and 1/4 for the choices."""
    layer = SparseMoE(3, gating=NoisyTopKGating(3, k=2, noise=False), experts=Constants(), **kwargs)
    layer.build((None, 3))
    layer.gating.gate_kernel.assign(np.eye(3))
    x = np.full((len(choices), 3), -9.0, "float32")
    for row, pair in zip(x, choices, strict=True):
        row[list(pair)] = np.log([3.0, 1.0])
    y = layer(x, training=True, mask=mask)
    return np.ravel(y), metrics(layer)["fraction_dropped"]


def test_earlier_choices_come_first_then_earlier_rows():
    # C = ceil(1/2 · 2 · 3 / 3) = 1 place for each expert. First choices: expert 1 takes row 0 and
    # refuses row 1, expert 0 takes row 2. Second choices: expert 0 refuses row 0, which it had
    # taken, were the rows to go first; expert 2 takes row 1, refuses row 2. Three of six dropped.
    y, dropped = answers([(1, 0), (1, 2), (0, 2)], capacity_factor=0.5)
    np.testing.assert_allclose(y, [0.75 * 10, 0.25 * 100, 0.75 * 1], rtol=1e-6)
    np.testing.assert_allclose(dropped, 0.5)


def test_masked_rows_take_no_place_and_dropped_rows_give_zeros():
    # C = ceil(1/2 · 2 · 4 / 3) = 2: experts 0 and 1 take rows 1 and 2; row 3 is left without any.
    choices, mask = [(0, 1)] * 4, np.array([False, True, True, True])
    y, dropped = answers(choices, mask, capacity_factor=0.5)
    np.testing.assert_allclose(y, [0, 0.75 + 2.5, 0.75 + 2.5, 0], rtol=1e-6)
    np.testing.assert_allclose(dropped, 2 / 6)  # of the choices that are not masked


def test_the_metric_is_of_training_alone():
    layer = flat(capacity_factor=0.3, name="moe")
    layer(examples(), training=False)
    assert metrics(layer)["fraction_dropped"] == 0.0
    layer(examples(), training=True)
    assert metrics(layer)["fraction_dropped"] > 0.5
    assert "moe/fraction_dropped" in layer.metrics[0].result()
    assert "fraction_dropped" not in metrics(flat())


@pytest.mark.parametrize("mask", [None, np.zeros((3, 0), bool)])
def test_zero_examples(mask):
    layer, x = SparseMoE(4, 3, k=2, capacity_factor=1.0), np.zeros((3, 0, WIDTH), "float32")
    layer.build(x.shape)
    y, _, gradients = call_and_gradients(layer, x, training=True, mask=mask)
    assert y.shape == (3, 0, WIDTH)
    assert metrics(layer)["fraction_dropped"] == 0.0
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))


@pytest.mark.parametrize("make", [flat, hierarchical, balanced])
def test_broken_and_masked_rows_spoil_no_other(make):
    layer, x = make(capacity_factor=2.0), examples()
    x[3], x[5] = np.nan, np.inf
    received = run(layer, x, np.ones((24, 1)), training=True, mask=np.arange(24) != 3)
    assert not np.isfinite(received["y"][5]).all()
    assert np.isfinite(np.delete(received["y"], 5, axis=0)).all()
    np.testing.assert_array_equal(received["y"][3], np.zeros(layer.experts.output_dim or WIDTH))
    assert np.isfinite(received["losses"]).all()


def test_supports_jit_where_all_parts_do():
    assert SparseMoE(4, 3, capacity_factor=1.0).supports_jit
    assert SparseMoE(4, 3, gating="strictly_balanced", capacity_factor=1.0).supports_jit
    assert HierarchicalMoE(2, 2, 3, capacity_factor=1.0).supports_jit
    others = keras.config.backend() == "jax"  # Where no shape depends on the data.
    dense, gating = keras.layers.Dense(3), HierarchicalGating(2, 2)
    assert SparseMoE(4, 3).supports_jit == others
    assert SparseMoE(4, experts=dense, capacity_factor=1.0).supports_jit == others
    layer = HierarchicalMoE(2, 2, 3, gating=gating, capacity_factor=1.0)
    assert layer.supports_jit == others


@pytest.mark.parametrize(
    "moe",
    few_in_jax(
        {
            "flat": SparseMoE(6, 8, k=2, capacity_factor=1.2, name="moe"),
            "hierarchical": HierarchicalMoE(3, 2, 8, k=(1, 2), capacity_factor=1.2, name="moe"),
        },
        ["flat"],
    ),
)
def test_models_compile_by_themselves_and_learn(moe, monkeypatch):
    model, (x, y) = language_model(moe=moe), next_words()
    # Keras' TensorFlow compiles by itself only where there is something other than CPUs.
    with monkeypatch.context() as patched:
        if keras.config.backend() == "tensorflow":
            import tensorflow as tf

            devices = [*tf.config.list_physical_devices(), tf.config.PhysicalDevice("/a:0", "GPU")]
            patched.setattr(tf.config, "list_physical_devices", lambda kind=None: devices)
        model.compile(keras.optimizers.Adam(0.03), CROSS_ENTROPY)
    assert model.jit_compile
    history = model.fit(x, y, batch_size=16, epochs=8, verbose=0).history
    assert history["loss"][-1] < 0.7 * history["loss"][0]
    assert 0.0 <= history["moe/fraction_dropped"][-1] < 1.0
    logs = model.evaluate(x, y, batch_size=16, verbose=0, return_dict=True)
    assert logs["moe/fraction_dropped"] == 0.0
    np.testing.assert_allclose(
        model.predict(x, batch_size=16, verbose=0), model(x, training=False), rtol=1e-4, atol=1e-4
    )
