"""SparseMoE: its config, parts of a user's own, and what it refuses."""

import keras
import numpy as np
import pytest
from helpers import CROSS_ENTROPY, WIDTH, next_words

import keras_moe
from keras_moe import SparseMoE
from keras_moe.gating.routing import check_routing


def test_config_carries_every_argument():
    arguments = {
        "num_experts": 6,
        "hidden_units": [4, 5],
        "k": 3,
        "activation": "gelu",
        "output_dim": 7,
        "use_bias": True,
        "gating": "softmax",
        "importance_loss_weight": 0.3,
        "load_loss_weight": 0.2,
        "kernel_initializer": keras.initializers.HeNormal(seed=1),
        "bias_initializer": keras.initializers.Constant(0.5),
        "kernel_regularizer": keras.regularizers.L1(0.1),
        "bias_regularizer": keras.regularizers.L2(0.2),
        "seed": 9,
        "name": "mixture",
    }
    serialized = {
        key: keras.saving.serialize_keras_object(value)
        if key.endswith(("initializer", "regularizer"))
        else value
        for key, value in arguments.items()
    }
    # Softmax gating takes every expert.
    for gating, k in (("softmax", 6), ("noisy_top_k", 3)):
        layer = SparseMoE(**{**arguments, "gating": gating})
        config = layer.get_config()
        assert {**serialized, "gating": gating, "k": k}.items() <= config.items()
        bank = SparseMoE.from_config(config).experts.get_config()
        assert {key: bank[key] for key in serialized if key in bank and key != "name"} == {
            key: serialized[key] for key in serialized if key in bank and key != "name"
        }


def test_config_carries_a_gating_and_a_bank_of_ones_own():
    layer = SparseMoE(
        6,
        gating=keras_moe.NoisyTopKGating(6, k=3, noise=False),
        experts=keras_moe.FeedForwardExperts(6, [4, 4], use_bias=True),
    )
    x = np.random.default_rng(0).normal(size=(5, WIDTH)).astype("float32")
    y = layer(x)
    clone = SparseMoE.from_config(layer.get_config())
    clone.build(x.shape)
    clone.set_weights(layer.get_weights())
    np.testing.assert_array_equal(clone(x), y)
    assert clone.get_config() == layer.get_config()
    assert [tuple(v.shape) for v in clone.experts.kernels] == [(6, 6, 4), (6, 4, 4), (6, 4, 6)]
    assert not hasattr(clone.gating, "noise_kernel")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 4, "hidden_units": 8, "k": 5}, "k=5, num_experts=4"),
        ({"num_experts": 4, "hidden_units": 8, "k": 0}, "k=0, num_experts=4"),
        ({"num_experts": 0, "hidden_units": 8}, "`num_experts` must be .* Received: 0"),
        ({"num_experts": 4.0, "hidden_units": 8}, "`num_experts` must be .* Received: 4.0"),
        ({"num_experts": True, "hidden_units": 8}, "`num_experts` must be .* Received: True"),
        ({"num_experts": 4, "hidden_units": 8, "k": 2.5}, "k=2.5, num_experts=4"),
        ({"num_experts": 4, "hidden_units": 8, "k": "2"}, "k='2', num_experts=4"),
        ({"num_experts": 4, "hidden_units": 0}, "`hidden_units` must be .* Received: 0"),
        ({"num_experts": 4, "hidden_units": "8"}, "`hidden_units` must be .* Received: '8'"),
        ({"num_experts": 4, "hidden_units": [8, 2.5]}, "`hidden_units` must be .* Received: 2.5"),
        ({"num_experts": 4, "hidden_units": []}, r"`hidden_units` must have an entry"),
        ({"num_experts": 4, "hidden_units": 8, "output_dim": 0}, "`output_dim`.*Received: 0"),
        ({"num_experts": 4}, "either `hidden_units`"),
        (
            {"num_experts": 4, "hidden_units": 8, "experts": keras_moe.FeedForwardExperts(4, 8)},
            "either `hidden_units`",
        ),
        ({"num_experts": 4, "hidden_units": 8, "gating": "top"}, "noisy_top_k.*Received: 'top'"),
        (
            {"num_experts": 4, "hidden_units": 8, "gating": keras_moe.NoisyTopKGating(8)},
            "`num_experts=4`.* made for 8",
        ),
        (
            {"num_experts": 4, "experts": keras_moe.FeedForwardExperts(5, 8)},
            "`num_experts=4`.* made for 5",
        ),
        ({"num_experts": 4, "experts": "dense"}, "must be a Keras layer.*Received: 'dense'"),
        (
            {"num_experts": 4, "experts": keras_moe.FeedForwardExperts(4, 8), "use_bias": True},
            "beside `experts`: use_bias",
        ),
        ({"num_experts": 4, "hidden_units": 8, "load_loss_weight": float("nan")}, "Received: nan"),
        (
            {"num_experts": 4, "hidden_units": 8, "load_loss_weight": -1},
            "`load_loss_weight` must be a number, not negative. Received: -1",
        ),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SparseMoE(**arguments)


@pytest.mark.parametrize("shape", [(3,), (None, None), (2, 2, 2, 2, 2)])
def test_wrong_inputs_are_refused(shape):
    with pytest.raises(ValueError, match="rank 2 to 4 whose last dimension is known"):
        SparseMoE(4, 8)(keras.KerasTensor(shape))


@pytest.mark.parametrize("shape", [(2,), (3, 2), (2, 1), (2, 3, 1)])
def test_a_mask_of_the_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError, match="one entry for each position"):
        SparseMoE(4, 8)(np.ones((2, 3, WIDTH)), mask=np.ones(shape, bool))


def test_one_layer_takes_inputs_of_every_rank_but_of_one_width():
    layer = SparseMoE(4, 8, k=2)
    layer.route(np.ones((5, WIDTH)))
    assert layer(np.ones((2, 3, WIDTH))).shape == (2, 3, WIDTH)
    assert layer(np.ones((2, 1, 3, WIDTH))).shape == (2, 1, 3, WIDTH)
    with pytest.raises(ValueError, match="expected axis -1 of input shape to have value 6"):
        layer(np.ones((2, 3, WIDTH + 1)))
    with pytest.raises(ValueError, match="built for inputs of width 6"):
        layer.route(np.ones((2, WIDTH + 1)))
    with pytest.raises(ValueError, match="rank 2 to 4"):
        layer.route(np.ones((1, 1, 1, 2, WIDTH)))


@keras.saving.register_keras_serializable("tests")
class LastExperts(keras.layers.Layer):
    """A gating of a user's own, as documented: a sublayer, no `build`, K = 2 fixed experts."""

    def __init__(self, num_experts, **kwargs):
        super().__init__(**kwargs)
        self.num_experts = num_experts
        self.supports_masking = True
        self.preference = keras.layers.Dense(2, "softmax")

    def call(self, x, training=None, mask=None):
        gates = self.preference(x)
        if mask is not None:
            gates *= keras.ops.cast(mask[:, None], gates.dtype)
        index = keras.ops.zeros_like(gates, "int32") + np.array([self.num_experts - 1, 0], "int32")
        uses = keras.ops.sum(gates, axis=0)
        load = keras.ops.concatenate([uses[1:], keras.ops.zeros(self.num_experts - 2), uses[:1]])
        return keras_moe.Routing(index, gates, load, load)

    def get_config(self):
        return {**super().get_config(), "num_experts": self.num_experts}


@keras.saving.register_keras_serializable("tests")
class ScaledExperts(LastExperts):
    """The same with a `build` of its own that leaves the sublayer to be built when it is called."""

    def build(self, input_shape):
        self.scale = self.add_weight(name="scale", initializer="ones")

    def call(self, x, training=None, mask=None):
        return super().call(x * self.scale, training, mask)


@keras.saving.register_keras_serializable("tests")
class NormalizedExperts(LastExperts):
    """The same with a `build` of its own that makes a further sublayer, and builds all."""

    def build(self, input_shape):
        self.normalization = keras.layers.LayerNormalization()
        self.normalization.build(input_shape)
        self.preference.build(input_shape)

    def call(self, x, training=None, mask=None):
        return super().call(self.normalization(x), training, mask)


class ExpertsWithTwoShapes(keras_moe.FeedForwardExperts):
    """A bank whose `build` takes the shapes of both inputs, as Keras hands them over by name."""

    def build(self, rows_shape, rows_per_expert_shape):
        assert rows_per_expert_shape == (self.num_experts,)
        super().build(rows_shape)


def test_a_bank_of_ones_own_is_built_with_the_layer():
    layer = SparseMoE(5, experts=ExpertsWithTwoShapes(5, 16), k=2)
    layer.build((None, 8))
    assert len(layer.experts.weights) == 2
    assert layer(np.ones((3, 8), "float32")).shape == (3, 8)


@pytest.mark.parametrize(
    ("gating", "weights"), [(LastExperts, 2), (ScaledExperts, 3), (NormalizedExperts, 4)]
)
@pytest.mark.parametrize("trainable", [True, False])
def test_a_part_of_ones_own_is_built_with_the_layer(gating, weights, trainable):
    layer = SparseMoE(5, 16, gating=gating(5))
    layer.gating.trainable = trainable
    layer.build((None, 8))
    assert [weight.trainable for weight in layer.gating.weights] == [trainable] * weights
    assert len(layer.trainable_weights) == weights * trainable + 2  # those of the experts


def test_a_gating_of_ones_own_trains_saves_and_loads(tmp_path):
    x, y = next_words()
    model = keras.Sequential(
        [
            keras.layers.Embedding(50, 8, mask_zero=True),
            SparseMoE(5, 16, gating=LastExperts(5)),
            keras.layers.Dense(50),
        ]
    )
    model.build((None, None))
    assert len(model.layers[1].trainable_weights) == 4  # kernel and bias, and two banks
    model.compile(keras.optimizers.Adam(0.03), CROSS_ENTROPY)
    losses = model.fit(x, y, batch_size=16, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert_index": np.zeros((3, 2))}, "`expert_index` .* must be int32"),
        ({"gates": np.ones(3, "float32")}, "`gates` .* must be float32 of shape"),
        ({"gates": np.ones((3, 1), "float32")}, r"`gates` .* Received: float32 of shape \(3, 1\)"),
        ({"importance": np.ones((3, 4), "float32")}, r"`importance` .* float32 of shape \[4\]"),
        ({"load": np.ones(5, "float32")}, r"`load` .* Received: float32 of shape \(5,\)"),
    ],
)
def test_a_wrong_routing_is_refused(change, message):
    routing = {
        "expert_index": np.zeros((3, 2), "int32"),
        "gates": np.ones((3, 2), "float32"),
        "importance": np.ones(4, "float32"),
        "load": np.ones(4, "float32"),
    }
    routing = {
        key: keras.ops.convert_to_tensor(value) for key, value in {**routing, **change}.items()
    }
    with pytest.raises(ValueError, match=message):
        check_routing(keras_moe.Routing(**routing), 4)
    with pytest.raises(ValueError, match="must return a `Routing`"):
        check_routing(tuple(routing.values()), 4)
