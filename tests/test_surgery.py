"""Layers made of trained ones: upcycled, grown and pruned."""

import textwrap

import keras
import numpy as np
import pytest
from helpers import WIDTH, assign_random_weights

import keras_moe
from keras_moe import HierarchicalMoE, NoisyTopKGating, SparseMoE

X = np.random.default_rng(0).normal(size=(50, WIDTH)).astype("float32")


def dense_layers(*units, width=WIDTH, last="linear", **kwargs):
    layers = [
        keras.layers.Dense(n, **{"activation": "gelu" if i < len(units) - 1 else last, **kwargs})
        for i, n in enumerate(units)
    ]
    for layer, n in zip(layers, [width, *units], strict=False):
        layer.build((None, n))
        assign_random_weights(layer, np.random.default_rng(n))
    return layers


def trained(layer, scale=0.5):
    """A built layer with weights far from the initial ones, small enough to compare outputs."""
    layer(X)
    assign_random_weights(layer, np.random.default_rng(1))
    for weight in layer.weights:
        weight.assign(scale * weight)
    return layer


def arrays(layer):
    return [keras.ops.convert_to_numpy(weight) for weight in layer.weights]


def assert_same(before, after):
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


def assert_trains_saves_and_loads(layer, tmp_path):
    """`layer` inside a model: `fit` lowers the loss, and a saved model predicts the same."""
    model = keras.Sequential([keras.Input((WIDTH,)), layer])
    model.compile(keras.optimizers.Adam(0.01), "mse", run_eagerly=True)
    history = model.fit(X, np.sin(X), epochs=6, verbose=0).history["loss"]
    assert history[-1] < 0.9 * history[0]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    expected = model.predict(X, verbose=0)
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), expected)


def run_example(function, model):
    """Runs the example of a docstring and returns what it makes of the model."""
    code = function.__doc__.split("```python\n")[1].split("```")[0]
    names = {"model": model, "keras_moe": keras_moe, "keras": keras, "np": np, "x_val": X}
    exec(textwrap.dedent(code), names)
    return names["model"]


@pytest.mark.parametrize(
    ("units", "kwargs", "moe_kwargs"),
    [
        ((16, WIDTH), {}, {"k": 2}),
        ((16, 3), {"use_bias": False}, {"k": 4, "seed": 1}),
        ((8, 12, 5), {}, {"k": 3}),
        ((16, WIDTH), {}, {"gating": "softmax"}),
    ],
)
@pytest.mark.parametrize("as_model", [False, True])
def test_an_upcycled_layer_computes_what_the_dense_layers_did(units, kwargs, moe_kwargs, as_model):
    layers = dense_layers(*units, **kwargs)
    dense = keras.Sequential([keras.Input((WIDTH,)), *layers])
    before = arrays(dense)
    moe = keras_moe.upcycle(dense if as_model else layers, 4, **moe_kwargs)
    assert moe.built and moe.num_experts == 4
    np.testing.assert_allclose(moe(X), dense(X), rtol=1e-5, atol=1e-5)
    # Noise picks other experts, all of them equal; the gates sum to 1 all the same.
    np.testing.assert_allclose(moe(X, training=True), dense(X), rtol=1e-5, atol=1e-5)
    assert_same(arrays(dense), before)


def test_with_one_expert_per_example_the_first_gate_is_one_in_n():
    layers = dense_layers(16, WIDTH)
    moe = keras_moe.upcycle(layers, 4, k=1)
    # Equal logits of zero: the probability of each of 4 experts is 1/4.
    np.testing.assert_allclose(moe(X), layers[1](layers[0](X)) / 4, rtol=1e-5, atol=1e-6)


def test_an_upcycled_layer_takes_arguments_and_the_dtype():
    layers = dense_layers(16, WIDTH, dtype="mixed_bfloat16")
    moe = keras_moe.upcycle(
        layers, 4, k=2, name="moe", load_loss_weight=0.5, kernel_regularizer="l2"
    )
    config = moe.get_config()
    assert (config["name"], config["load_loss_weight"], moe.k) == ("moe", 0.5, 2)
    assert moe.experts.kernel_regularizer is not None
    assert moe.dtype_policy.name == moe.experts.dtype_policy.name == "mixed_bfloat16"
    assert keras_moe.upcycle(layers, 4, dtype="float32").dtype_policy.name == "float32"


def test_an_upcycled_layer_trains_saves_and_loads(tmp_path):
    moe = keras_moe.upcycle(dense_layers(16, WIDTH), 4, k=2, seed=0)
    assert_trains_saves_and_loads(moe, tmp_path)
    # The noise has told the copies apart.
    kernels = keras.ops.convert_to_numpy(moe.experts.kernels[0])
    for i in range(1, 4):
        assert np.abs(kernels[i] - kernels[0]).max() > 1e-3


def quantized():
    layers = dense_layers(16, WIDTH)
    layers[0].quantize("int8")
    return layers


@pytest.mark.parametrize(
    ("layers", "kwargs", "message"),
    [
        (lambda: dense_layers(16), {}, "at least one hidden layer.*1 layers"),
        (lambda: [], {}, "at least one hidden layer.*0 layers"),
        (lambda: [*dense_layers(16, 6), keras.layers.Dropout(0.1)], {}, "must be a.*Dropout"),
        (quantized, {}, "not quantized"),
        (lambda: [*dense_layers(16, 6)[:1], keras.layers.Dense(6)], {}, "build .* first"),
        (
            lambda: [*dense_layers(16, 6)[:1], *dense_layers(8, 6)[1:]],
            {},
            r"take what the one before.*\[\(6, 16\), \(8, 6\)\]",
        ),
        (lambda: dense_layers(16, 6, last="gelu"), {}, "must be linear.*'gelu'"),
        (
            lambda: [*dense_layers(6, 6, use_bias=False)[:1], *dense_layers(6, 6)[1:]],
            {},
            r"must have a bias.*\[False, True\]",
        ),
        (
            lambda: [*dense_layers(6, 6, last="relu"), *dense_layers(6, 6)[1:]],
            {},
            r"one activation.*\['gelu', 'relu'\]",
        ),
        (lambda: dense_layers(16, 6), {"activation": "relu"}, "leave them out.*activation"),
        (lambda: dense_layers(16, 6), {"k": 5}, "`k`.*k=5, num_experts=4"),
    ],
)
def test_upcycling_says_what_it_cannot_take(layers, kwargs, message):
    with pytest.raises(ValueError, match=message):
        keras_moe.upcycle(layers(), 4, **kwargs)


@pytest.mark.parametrize(
    ("layer", "num_experts", "k"),
    [
        (lambda: SparseMoE(6, 8, k=2, use_bias=True), 12, 4),
        (lambda: SparseMoE(3, (8, 5), k=3, output_dim=4), 6, 6),
        (lambda: SparseMoE(4, 8, gating="softmax"), 8, None),
        (lambda: SparseMoE(4, 8, gating=NoisyTopKGating(4, 2, noise=False)), 8, 4),
        (lambda: HierarchicalMoE(3, 2, 8, k=(2, 1)), 12, (4, 1)),
        (lambda: HierarchicalMoE(3, 2, 8, k=(2, 2), use_bias=True), 12, (4, 2)),
        (lambda: HierarchicalMoE(2, 2, 8, gating=NoisyTopKGating(4, 2)), 8, 4),
    ],
)
def test_twice_the_experts_and_twice_the_choices_compute_the_same(layer, num_experts, k):
    layer = trained(layer())
    before = arrays(layer)
    grown = keras_moe.grow(layer, num_experts, k=k)
    # An expert and its copy share what was the gate of one: exp / 2Σexp each.
    np.testing.assert_allclose(grown(X), layer(X), rtol=1e-5, atol=1e-5)
    assert grown.num_experts == num_experts
    assert type(grown) is type(layer)
    assert_same(arrays(layer), before)


def test_new_experts_are_copies_in_turn():
    layer = trained(SparseMoE(3, 8, k=2, use_bias=True))
    grown = keras_moe.grow(layer, 8)
    origins = [0, 1, 2, 0, 1, 2, 0, 1]
    for name in ("gate_kernel", "noise_kernel"):
        old, new = (np.asarray(getattr(each.gating, name).value) for each in (layer, grown))
        np.testing.assert_array_equal(new, old[:, origins])
    assert_same(arrays(grown.experts), [weight[origins] for weight in arrays(layer.experts)])


def test_new_groups_are_copies_in_turn():
    layer = trained(HierarchicalMoE(2, 3, 8, k=(1, 2)))
    grown = keras_moe.grow(layer, 9)
    assert (grown.num_groups, grown.experts_per_group, grown.k) == (3, 3, (1, 2))
    for name, axis in {
        "primary": 1,
        "primary_noise": 1,
        "secondary": 0,
        "secondary_noise": 0,
    }.items():
        old, new = (np.asarray(getattr(each.gating, name).value) for each in (layer, grown))
        np.testing.assert_array_equal(new, np.take(old, [0, 1, 0], axis=axis))
    leaves = [0, 1, 2, 3, 4, 5, 0, 1, 2]
    assert_same(arrays(grown.experts), [weight[leaves] for weight in arrays(layer.experts)])


def test_the_configuration_carries_over():
    layer = trained(
        SparseMoE(
            4,
            8,
            k=2,
            activation="gelu",
            use_bias=True,
            importance_loss_weight=0.3,
            load_loss_weight=0.2,
            kernel_regularizer="l2",
            seed=3,
            name="moe",
            dtype="mixed_bfloat16",
        )
    )
    for new in (keras_moe.grow(layer, 6), keras_moe.prune(layer, [3, 0])):
        expected = {**layer.get_config(), "num_experts": new.num_experts}
        assert new.get_config() == expected
        assert new.experts.dtype_policy.name == "mixed_bfloat16"
    own = trained(SparseMoE(4, 8, gating=NoisyTopKGating(4, 2, noise_epsilon=0.5, name="mine")))
    assert keras_moe.grow(own, 6).gating.get_config() == {
        **own.gating.get_config(),
        "num_experts": 6,
    }
    assert keras_moe.prune(own, [2, 1, 0], k=1).k == 1


@pytest.mark.parametrize(
    "layer", [lambda: SparseMoE(3, 8, k=2), lambda: HierarchicalMoE(3, 2, 8, k=(2, 1))]
)
def test_a_grown_layer_trains_saves_and_loads(layer, tmp_path):
    keras.utils.set_random_seed(0)
    layer = trained(layer())
    grown = keras_moe.grow(layer, 2 * layer.num_experts)
    assert_trains_saves_and_loads(grown, tmp_path)
    # The noise has told each expert from its copy.
    kernels = keras.ops.convert_to_numpy(grown.experts.kernels[0])
    difference = kernels[layer.num_experts :] - kernels[: layer.num_experts]
    assert np.all(np.abs(difference).max(axis=(1, 2)) > 1e-3)


@pytest.mark.parametrize(
    ("layer", "keep"),
    [
        (lambda: SparseMoE(6, 8, k=2, use_bias=True), [4, 0, 3, 1]),
        (lambda: SparseMoE(6, 8, gating=NoisyTopKGating(6, 2)), np.array([4, 0, 3, 1])),
    ],
)
def test_experts_never_chosen_can_go(layer, keep):
    layer = trained(layer())
    # Positive inputs and columns of -9: experts 2 and 5 come last for every example.
    x = np.abs(X)
    gate_kernel = arrays(layer.gating)[0].copy()
    gate_kernel[:, [2, 5]] = -9
    layer.gating.gate_kernel.assign(gate_kernel)
    assert set(np.unique(layer.route(x).expert_index)) == {0, 1, 3, 4}
    before = arrays(layer)
    pruned = keras_moe.prune(layer, keep)
    np.testing.assert_allclose(pruned(x), layer(x), rtol=1e-6, atol=1e-6)
    # Expert i of the new layer is expert keep[i] of the old one.
    chosen = np.asarray(pruned.route(x).expert_index)
    np.testing.assert_array_equal(np.asarray(keep)[chosen], layer.route(x).expert_index)
    assert_same(arrays(layer), before)


def test_used_experts_are_those_with_more_than_a_share_of_the_even_load():
    layer = trained(SparseMoE(4, 8, k=1, name="moe"))
    # Each example goes to the expert of its largest feature: 6, 3, 1 and 0 of 10.
    layer.gating.gate_kernel.assign(np.eye(WIDTH, 4))
    x = np.eye(WIDTH, dtype="float32")[[0] * 6 + [1] * 3 + [2]]
    model = keras.Sequential([keras.Input((WIDTH,)), layer])
    # The even share is 2.5.
    for min_share, expected in ((0, [0, 1, 2]), (0.4, [0, 1]), (0.5, [0, 1]), (1.3, [0])):
        for data in (x, [x[:5], (x[5:], np.zeros(5))]):
            used = keras_moe.used_experts(model, data, min_share)
            assert list(used) == ["moe"] and used["moe"].tolist() == expected
    pruned = keras_moe.prune(layer, keras_moe.used_experts(model, x)["moe"])
    assert pruned.num_experts == 3
    for arguments, message in (((x, -1), "min_share"), ((iter([x]),), "read once")):
        with pytest.raises(ValueError, match=message):
            keras_moe.used_experts(model, *arguments)


def test_a_group_is_used_by_any_of_its_experts():
    layer = trained(HierarchicalMoE(3, 2, 8, k=(1, 1), name="moe"))
    layer.gating.primary.assign(np.eye(WIDTH, 3))
    model = keras.Sequential([keras.Input((WIDTH,)), layer])
    x = np.eye(WIDTH, dtype="float32")[[0, 2, 2]]
    assert keras_moe.used_experts(model, x)["moe"].tolist() == [0, 2]


def test_groups_never_chosen_can_go():
    layer = trained(HierarchicalMoE(4, 2, 8, k=(2, 1)))
    x = np.abs(X)
    primary = arrays(layer.gating)[0].copy()
    primary[:, 1] = -9
    layer.gating.primary.assign(primary)
    pruned = keras_moe.prune(layer, [3, 2, 0])
    assert (pruned.num_groups, pruned.num_experts) == (3, 6)
    np.testing.assert_allclose(pruned(x), layer(x), rtol=1e-6, atol=1e-6)


def test_a_pruned_layer_trains_saves_and_loads(tmp_path):
    layer = trained(SparseMoE(6, 8, k=2))
    assert_trains_saves_and_loads(keras_moe.prune(layer, [5, 1, 2]), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: keras_moe.grow(layer, 4), "above that of the layer.*num_experts=4.*with 4"),
        (lambda layer: keras_moe.grow(layer, 0), "at least 1. Received: 0"),
        (lambda layer: keras_moe.grow(layer, 8, k=9), "choose 9 of 8.*k=9"),
        (lambda layer: keras_moe.prune(layer, [0, 1, 4]), r"from 0 to 3.*keep=\[0, 1, 4\]"),
        (lambda layer: keras_moe.prune(layer, [-1, 1]), r"from 0 to 3.*keep=\[-1, 1\]"),
        (lambda layer: keras_moe.prune(layer, [0, 1, 1]), "each once"),
        (lambda layer: keras_moe.prune(layer, []), "at least one"),
        (lambda layer: keras_moe.prune(layer, 2), "must list experts.*keep=2"),
        (lambda layer: keras_moe.prune(layer, [0.5, 1]), "integers"),
        (lambda layer: keras_moe.prune(layer, [1, 3]), "choose 3 of 2.*smaller `k`.*k=3"),
        (lambda layer: keras_moe.grow(layer.experts, 8), "must be a SparseMoE.*FeedForwardExperts"),
        (lambda layer: keras_moe.grow(SparseMoE(4, 8), 8), "build 'sparse_moe.*' first"),
    ],
)
def test_changes_that_cannot_be_made_say_why(change, message):
    with pytest.raises(ValueError, match=message):
        change(trained(SparseMoE(4, 8, k=3)))


def test_groups_grow_and_go_as_a_whole():
    layer = trained(HierarchicalMoE(3, 2, 8, k=(2, 1)))
    with pytest.raises(ValueError, match="multiple of `experts_per_group=2`.*num_experts=9"):
        keras_moe.grow(layer, 9)
    with pytest.raises(ValueError, match=r"choose 2 of 1.*k=\(2, 1\)"):
        keras_moe.prune(layer, [2])
    assert keras_moe.prune(layer, [2], k=(1, 1)).k == (1, 1)


def test_a_gating_without_k_is_given_none():
    with pytest.raises(ValueError, match="no `k`.*k=2"):
        keras_moe.grow(trained(SparseMoE(4, 8, gating="softmax")), 8, k=2)


class PlainGating(keras.layers.Layer):
    """A gating that knows nothing of keras_moe but its `Routing`."""

    def __init__(self, num_experts, **kwargs):
        super().__init__(**kwargs)
        self.num_experts = num_experts
        self.supports_masking = True

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(input_shape[-1], self.num_experts), name="kernel")
        self.scale = self.add_weight(shape=(input_shape[-1],), name="scale")

    def call(self, x, training=None, mask=None):
        gating = keras.ops.softmax(keras.ops.matmul(x * self.scale, self.kernel))
        index = keras.ops.broadcast_to(keras.ops.arange(self.num_experts), keras.ops.shape(gating))
        return keras_moe.routing.make_routing(index, gating, self.num_experts, mask)


class UnsizedGating(PlainGating):
    def get_config(self):
        return {"name": self.name}


class WrongAxisGating(PlainGating):
    def expert_axis(self, variable):
        return None


class WholeGating(PlainGating):
    def expert_axis(self, variable):
        return {"kernel": 1}.get(variable.name)


@pytest.mark.parametrize(
    ("gating", "message"),
    [
        (UnsizedGating, "Put `num_experts` into what `UnsizedGating.get_config`"),
        (PlainGating, r"Give PlainGating a method `expert_axis\(variable\)`"),
        (WrongAxisGating, r"shape of kernel.*expert_axis None, shape \(6, 4\) before and \(6, 8\)"),
    ],
)
def test_a_gating_of_ones_own_has_to_say_what_belongs_to_an_expert(gating, message):
    layer = trained(SparseMoE(4, 8, gating=gating(4)))
    with pytest.raises(ValueError, match=message):
        keras_moe.grow(layer, 8)


def test_a_gating_of_ones_own_can_be_grown_and_pruned():
    layer = trained(SparseMoE(4, 8, gating=WholeGating(4)))
    grown = keras_moe.grow(layer, 8)
    # Every expert and its copy: half the probability each.
    np.testing.assert_allclose(grown(X), layer(X), rtol=1e-5, atol=1e-5)
    pruned = keras_moe.prune(layer, [3, 1])
    kernel, scale = arrays(layer.gating)
    assert_same(arrays(pruned.gating), [kernel[:, [3, 1]], scale])


class ScaledRows(keras.layers.Layer):
    """The smallest bank of one's own: expert i multiplies its rows by a vector."""

    def __init__(self, num_experts, **kwargs):
        super().__init__(**kwargs)
        self.num_experts = num_experts

    def build(self, rows_shape, rows_per_expert_shape=None):
        self.scale = [
            self.add_weight(shape=(rows_shape[-1],), name=f"scale_{i}")
            for i in range(self.num_experts)
        ]

    def call(self, rows, rows_per_expert):
        *pieces, rest = keras_moe.grouped.split(rows, rows_per_expert)
        scaled = [piece * scale for piece, scale in zip(pieces, self.scale, strict=True)]
        return keras_moe.grouped.join(scaled, rest)

    def compute_output_shape(self, rows_shape, rows_per_expert_shape=None):
        return rows_shape

    def get_config(self):
        return {**super().get_config(), "num_experts": self.num_experts}


class ScaledRowsByExpert(ScaledRows):
    def copy_experts(self, bank, origins):
        for scale, origin in zip(self.scale, origins, strict=True):
            scale.assign(bank.scale[origin])


def test_a_bank_of_ones_own_is_copied_expert_by_expert():
    with pytest.raises(ValueError, match="Give ScaledRows a method `copy_experts"):
        keras_moe.grow(trained(SparseMoE(4, k=2, experts=ScaledRows(4))), 8)
    layer = trained(SparseMoE(4, k=2, experts=ScaledRowsByExpert(4)))
    np.testing.assert_allclose(keras_moe.grow(layer, 8, k=4)(X), layer(X), rtol=1e-5, atol=1e-5)
    scales = arrays(layer.experts)
    assert_same(arrays(keras_moe.prune(layer, [2, 0, 3]).experts), [scales[i] for i in (2, 0, 3)])


def test_experts_of_a_cloned_layer_and_shared_experts_are_copied():
    expert = keras.layers.Dense(WIDTH, "tanh")
    layer = trained(SparseMoE(3, k=2, experts=expert, num_shared_experts=1))
    np.testing.assert_allclose(keras_moe.grow(layer, 6, k=4)(X), layer(X), rtol=1e-5, atol=1e-5)
    pruned = keras_moe.prune(layer, [2, 0])
    assert_same(arrays(pruned.shared_experts), arrays(layer.shared_experts))
    for new, origin in zip(pruned.experts.layers, [2, 0], strict=True):
        assert_same(arrays(new), arrays(layer.experts.layers[origin]))


def test_the_example_of_upcycle_runs():
    inputs = keras.Input((WIDTH,))
    hidden = keras.layers.Dense(16, activation="relu", name="up")(inputs)
    outputs = keras.layers.Dense(2)(inputs + keras.layers.Dense(WIDTH, name="down")(hidden))
    model = keras.Model(inputs, outputs)
    upcycled = run_example(keras_moe.upcycle, model)
    assert any(isinstance(layer, SparseMoE) for layer in upcycled.layers)
    np.testing.assert_allclose(upcycled(X), model(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("functional", [False, True])
def test_the_examples_of_grow_and_prune_run(functional):
    layer = trained(SparseMoE(10, 4, k=2, name="moe"))
    model = keras.Sequential([keras.Input((WIDTH,)), layer, keras.layers.Dense(2)])
    if functional:
        inputs = keras.Input((WIDTH,))
        model = keras.Model(inputs, keras.layers.Dense(2)(inputs + layer(inputs)))
    grown = run_example(keras_moe.grow, model)
    assert (grown.get_layer("moe").num_experts, grown.get_layer("moe").k) == (20, 4)
    np.testing.assert_allclose(grown(X), model(X), rtol=1e-5, atol=1e-5)
    layer.gating.gate_kernel.assign(np.eye(WIDTH, 10))  # Those without a feature win no example.
    pruned = run_example(keras_moe.prune, model)
    used = np.unique(layer.route(X).expert_index)
    assert pruned.get_layer("moe").num_experts == len(used) < 10
    np.testing.assert_allclose(pruned(X), model(X), rtol=1e-5, atol=1e-5)
    assert pruned.layers[-1] is model.layers[-1]
    assert pruned(X).shape == (50, 2)
