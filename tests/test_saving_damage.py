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


def make_model(seed, num_experts=3):
    model = keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            keras.layers.Embedding(7, WIDTH),
            keras_moe.SparseMoE(
                num_experts, experts=expert(), k=2, num_shared_experts=1, name="clones"
            ),
            keras_moe.HierarchicalMoE(2, 2, 3, k=(1, 2), num_shared_experts=1),
            keras_moe.SparseMoE(3, 3, k=1, gating="strictly_balanced", capacity_factor=1.0),
            keras.layers.Dense(2),
        ]
    )
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    assign_random_weights(model, np.random.default_rng(seed))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model of seed 1, and the folder with its file."""
    folder = tmp_path_factory.mktemp("saved")
    model = make_model(seed=1)
    model.save_weights(folder / "plain.weights.h5")
    return model, folder


@pytest.fixture(scope="module")
def model():
    """A model of seed 0, which no test may change."""
    return make_model(seed=0)


@pytest.mark.parametrize("load", LOADS)
def test_intact_files_load(load, saved):
    source, folder = saved
    other = make_model(seed=0)
    assert bits(other) != bits(source)
    load(other, folder / "plain.weights.h5")
    assert bits(other) == bits(source)


def test_a_flipped_bit_in_a_mixture_is_found(model, saved, tmp_path):
    intact, damaged = saved[1] / "plain.weights.h5", tmp_path / "damaged.weights.h5"
    rng = np.random.default_rng(0)
    places = {name: place for name, place in datasets(intact).items() if "_mo_e" in name}
    clones = [name for name in places if "/experts/layers/sequential" in name]
    # Of 3 clones the kernel and bias of Dense; gamma, beta and the moving moments.
    assert len(clones) == 3 * 6
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


@pytest.mark.parametrize("load", LOADS)
def test_files_that_are_cut_off_are_refused(load, model, saved, tmp_path):
    content = (saved[1] / "plain.weights.h5").read_bytes()
    damaged, size = tmp_path / "damaged.weights.h5", len(content)
    for length in (0, 1, 30, 511, 512, 513, 1000, size // 3, size // 2, size - 100, size - 1):
        damaged.write_bytes(content[:length])
        assert_refused(load, model, damaged)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("num_experts", [2, 4])
def test_clones_of_another_number_are_refused(num_experts, load, saved, tmp_path):
    path = tmp_path / "model.weights.h5"
    make_model(seed=1, num_experts=num_experts).save_weights(path)
    model = make_model(seed=0)
    bank = model.get_layer("clones").experts
    before = bits(bank)
    with pytest.raises(
        ValueError, match=f"holds {num_experts} experts, the layer 'experts' has 3.*moe.grow and"
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


def test_one_clone_goes_to_a_file_of_its_own(saved, tmp_path):
    model, folder = saved
    keras_moe.load_weights(model, folder / "plain.weights.h5")
    path = tmp_path / "expert.weights.h5"
    clone = model.get_layer("clones").experts.layers[1]
    clone.save_weights(path)
    alone = expert()
    alone.build((None, WIDTH))
    alone.load_weights(path)
    assert bits(alone) == bits(clone)
    clone.load_weights(path)
