"""Damage anywhere in the weight file of a model that has all kinds of layers."""

import shutil

import h5py
import keras
import numpy as np
import pytest
from helpers import WIDTH, assign_random_weights
from weight_files import assert_refused, bits, datasets, flip

import keras_moe

LOADS = [keras.Model.load_weights, keras_moe.load_weights]


def expert():
    return keras.Sequential([keras.layers.Dense(4), keras.layers.BatchNormalization()])


def make_model(seed, num_experts=2):
    model = keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            keras.layers.Embedding(7, WIDTH),
            keras_moe.SparseMoE(
                num_experts, experts=expert(), k=1, num_shared_experts=1, name="clones"
            ),
            keras_moe.HierarchicalMoE(2, 2, 3, k=(1, 2), num_shared_experts=1),
            keras_moe.SparseMoE(3, 3, k=1, gating="strictly_balanced", capacity_factor=1.0),
            keras.layers.Dense(2),
        ]
    )
    model.compile("sgd", "mse")
    model.optimizer.build(model.trainable_variables)
    assign_random_weights(model, np.random.default_rng(seed))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model of seed 1, and its files: "plain" by Keras, "sealed" by keras_moe."""
    folder = tmp_path_factory.mktemp("saved")
    model = make_model(seed=1)
    model.save_weights(folder / "plain.weights.h5")
    keras_moe.save_weights(model, folder / "sealed.weights.h5")
    return model, folder


@pytest.fixture(scope="module")
def model():
    """A model of seed 0, which no test may change."""
    return make_model(seed=0)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("name", ["plain", "sealed"])
def test_intact_files_load(name, load, saved):
    source, folder = saved
    other = make_model(seed=0)
    assert bits(other) != bits(source)
    load(other, folder / f"{name}.weights.h5")
    assert bits(other) == bits(source)


def test_a_flipped_bit_in_any_array_is_found(model, saved, tmp_path):
    intact, damaged = saved[1] / "sealed.weights.h5", tmp_path / "damaged.weights.h5"
    rng = np.random.default_rng(0)
    places = datasets(intact).values()
    assert len(places) >= len(saved[0].weights) + len(saved[0].optimizer.variables)
    for place in places:
        shutil.copy(intact, damaged)
        flip(damaged, rng.choice(place), rng.integers(8))
        assert_refused(keras_moe.load_weights, model, damaged, ValueError, "is damaged")


def test_a_flipped_bit_in_a_mixture_is_found_without_a_seal(model, saved, tmp_path):
    intact, damaged = saved[1] / "plain.weights.h5", tmp_path / "damaged.weights.h5"
    rng = np.random.default_rng(0)
    places = {name: place for name, place in datasets(intact).items() if "_mo_e" in name}
    clones = [name for name in places if "/experts/layers/sequential" in name]
    # Of 2 clones the kernel and bias of Dense; gamma, beta and the moving moments.
    assert len(clones) == 2 * 6
    for name, place in places.items():
        shutil.copy(intact, damaged)
        flip(damaged, rng.choice(place), rng.integers(8))
        message = "The file holds -?[0-9]+ exp" if name.endswith("num_experts") else "is damaged"
        assert_refused(keras_moe.load_weights, model, damaged, ValueError, message)


def test_keras_alone_keeps_a_damaged_part_of_an_expert(saved, tmp_path):
    source, folder = saved
    damaged, model = tmp_path / "damaged.weights.h5", make_model(seed=0)
    shutil.copy(folder / "plain.weights.h5", damaged)
    name = "layers/sparse_mo_e/experts/layers/sequential_1/layers/dense/vars/0"
    flip(damaged, datasets(damaged)[name][9], 3)
    part = model.get_layer("clones").experts.layers[1].layers[0]
    before = bits(part)
    with pytest.raises(ValueError, match="(?s)A total of 1 .* is damaged"):
        model.load_weights(damaged)
    assert bits(part) == before
    model.load_weights(folder / "plain.weights.h5")
    assert bits(model) == bits(source)


def test_flipped_bits_anywhere_do_no_harm(model, saved, tmp_path):
    source, folder = saved
    intact, damaged = folder / "sealed.weights.h5", tmp_path / "damaged.weights.h5"
    rng = np.random.default_rng(0)
    content = intact.read_bytes()
    # The first are in the mark of keras_moe, without which the file is one of Keras, and whole.
    refused = 0
    for position in [0, 10, 20, *rng.integers(len(content), size=50)]:
        damaged.write_bytes(content)
        flip(damaged, position, rng.integers(8))
        before = bits(model)
        try:
            keras_moe.load_weights(model, damaged)
        except ValueError as error:
            assert "is damaged" in str(error)
            assert bits(model) == before
            refused += 1
        else:
            assert bits(model) == bits(source)
            assign_random_weights(model, np.random.default_rng(0))
    assert refused == 50


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("name", ["plain", "sealed"])
def test_files_that_are_cut_off_are_refused(name, load, model, saved, tmp_path):
    content = (saved[1] / f"{name}.weights.h5").read_bytes()
    damaged, size = tmp_path / "damaged.weights.h5", len(content)
    for length in (0, 1, 30, 511, 512, 513, 1000, size // 3, size // 2, size - 100, size - 1):
        damaged.write_bytes(content[:length])
        assert_refused(load, model, damaged)


def test_a_file_that_ends_in_zeros_is_refused(model, saved, tmp_path):
    # As a crash may leave one behind, whose length was written before its content.
    content = (saved[1] / "sealed.weights.h5").read_bytes()
    damaged = tmp_path / "damaged.weights.h5"
    for end in (1000, len(content) // 2, len(content.rstrip(b"\0")) - 1):
        damaged.write_bytes(content[:end].ljust(len(content), b"\0"))
        assert_refused(keras_moe.load_weights, model, damaged, ValueError, "is damaged")


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("num_experts", [1, 3])
def test_clones_of_another_number_are_refused(num_experts, load, saved, tmp_path):
    path = tmp_path / "model.weights.h5"
    make_model(seed=1, num_experts=num_experts).save_weights(path)
    model = make_model(seed=0)
    bank = model.get_layer("clones").experts
    before = bits(bank)
    with pytest.raises(
        ValueError, match=f"holds {num_experts} experts, the layer 'experts' has 2.*moe.grow and"
    ):
        load(model, path)
    assert bits(bank) == before


def test_clones_without_checksums_load(saved, tmp_path):
    source, folder = saved
    path = tmp_path / "model.weights.h5"
    shutil.copy(folder / "plain.weights.h5", path)
    with h5py.File(path, "a") as file:
        for bank in ("experts", "shared_experts"):
            for key in ("num_experts", "checksums"):
                del file[f"layers/sparse_mo_e/{bank}/vars/{key}"]
    model = make_model(seed=0)
    keras_moe.load_weights(model, path)
    assert bits(model) == bits(source)


def test_clones_save_and_load_in_the_way_of_their_class(saved, tmp_path):
    x = np.random.default_rng(0).normal(3.0, 2.0, size=(16, WIDTH)).astype("float32")
    experts = keras.Sequential([keras.layers.Normalization(), keras.layers.Dense(WIDTH)])
    model = keras.Sequential([keras_moe.SparseMoE(3, experts=experts, k=2)])
    model(x)
    for layer in model.layers[0].experts.layers:
        normalization, dense = layer.layers
        normalization.adapt(x)
        dense.enable_lora(2)
        dense.lora_kernel_b.assign(np.ones(dense.lora_kernel_b.shape))
    expected = model(x)
    path = tmp_path / "model.weights.h5"
    model.save_weights(path)
    other = keras.models.clone_model(model)
    other.load_weights(path)
    np.testing.assert_allclose(other(x), expected, rtol=1e-5, atol=1e-5)


@keras.saving.register_keras_serializable("tests")
class Holder(keras.layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = keras.layers.Dense(WIDTH)
        self.others = {"pair": (keras.layers.Dense(WIDTH), keras.layers.Dense(WIDTH))}

    def call(self, x):
        return self.first(x) + sum(layer(x) for layer in self.others["pair"])


def test_layers_in_attributes_and_containers_have_checksums():
    bank, store = keras_moe.LayerExperts(2, Holder()), {}
    bank.build((None, WIDTH))
    bank.save_own_variables(store)
    # Of each expert three kernels and three biases.
    assert len(store["checksums"]) == 2 * 6


def test_one_clone_goes_to_a_file_of_its_own(saved, tmp_path):
    model, folder = saved
    keras_moe.load_weights(model, folder / "sealed.weights.h5")
    path = tmp_path / "expert.weights.h5"
    clone = model.get_layer("clones").experts.layers[1]
    clone.save_weights(path)
    alone = expert()
    alone.build((None, WIDTH))
    alone.load_weights(path)
    assert bits(alone) == bits(clone)
    clone.load_weights(path)


def test_a_path_of_another_kind_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"must end in `.weights.h5`.*Received: .*model.keras"):
        keras_moe.save_weights(model, tmp_path / "model.keras")
