"""Weight files: intact ones come back bit by bit, others leave the model as it was."""

import shutil
import zipfile

import h5py
import keras
import numpy as np
import pytest
from helpers import WIDTH, assign_random_weights
from inputs import policies
from weight_files import assert_refused, bits, datasets, flip

import keras_moe


def make_model(policy="float32", layer=None, seed=0):
    """Layers of Keras before and behind the mixture, with weights of the given seed."""
    layer = layer or keras_moe.SparseMoE(8, 16, k=2, use_bias=True, name="moe", dtype=policy)
    dense = (keras.layers.Dense(WIDTH, dtype=policy) for _ in range(2))
    model = keras.Sequential([keras.Input((WIDTH,)), next(dense), layer, next(dense)])
    assign_random_weights(model, np.random.default_rng(seed))
    return model


def trained(num_experts, epochs):
    model = make_model(layer=keras_moe.SparseMoE(num_experts, 4, k=2))
    model.compile("adam", "mse", run_eagerly=True)
    model.fit(np.ones((4, WIDTH)), np.zeros((4, WIDTH)), epochs=epochs, verbose=0)
    return model


def mixture_data(path):
    """The places in the file of all that it holds for gating and experts, checksums included."""
    places = [p for name, p in datasets(path).items() if "/gating/" in name or "/experts/" in name]
    # Two kernels of the gating; two kernels and two biases of the bank; checksums of either.
    assert len(places) == 8
    return places


@pytest.mark.parametrize(
    "policy",
    policies("float32", "float64", "mixed_bfloat16", "mixed_float16", "bfloat16", "float16"),
)
def test_intact_files_come_back_bit_by_bit(policy, tmp_path):
    model = make_model(policy)
    model.save_weights(tmp_path / "model.weights.h5")
    model.save(tmp_path / "model.keras")
    for name in ("model.weights.h5", "model.keras"):
        for load in (keras.Model.load_weights, keras_moe.load_weights):
            other = make_model(policy, seed=1)
            assert bits(other) != bits(model)
            load(other, tmp_path / name)
            assert bits(other) == bits(model)
    assert bits(keras.models.load_model(tmp_path / "model.keras")) == bits(model)


def test_weights_go_from_one_dtype_to_another(tmp_path):
    model = make_model("float32")
    model.save_weights(tmp_path / "model.weights.h5")
    narrow = make_model("bfloat16", seed=1)
    narrow.load_weights(tmp_path / "model.weights.h5")
    for target, source in zip(narrow.weights, model.weights, strict=True):
        np.testing.assert_array_equal(target, keras.ops.cast(source, target.dtype))


def test_shards_come_back(tmp_path):
    model = make_model()
    path = tmp_path / "model.weights.json"
    # In GB, where the bank alone has 6 kB. Keras 3.10 can't load a layer that two files have.
    whole = keras.__version__.startswith("3.10.")
    model.save_weights(path, max_shard_size=7e-6 if whole else 5e-6)
    assert len(list(tmp_path.iterdir())) > 2
    other = make_model(seed=1)
    keras_moe.load_weights(other, path)
    assert bits(other) == bits(model)


def test_the_optimizer_comes_back(tmp_path):
    model, other = trained(8, epochs=2), trained(8, epochs=1)
    assert bits(other) != bits(model)
    model.save_weights(tmp_path / "model.weights.h5")
    keras_moe.load_weights(other, tmp_path / "model.weights.h5")
    assert bits(other) == bits(model)


def test_files_without_checksums_load(tmp_path):
    model = make_model()
    path = tmp_path / "model.weights.h5"
    model.save_weights(path)
    with h5py.File(path, "a") as file:
        for part in ("gating", "experts"):
            del file[f"layers/sparse_mo_e/{part}/vars/checksums"]
    other = make_model(seed=1)
    other.load_weights(path)
    assert bits(other) == bits(model)
    fewer = make_model(layer=keras_moe.SparseMoE(4, 16, k=2, use_bias=True))
    assert_refused(keras_moe.load_weights, fewer, path, ValueError, "holds 8 experts")


@pytest.mark.parametrize("name", ["model.weights.h5", "model.keras"])
def test_files_that_are_cut_off_are_refused(name, tmp_path):
    make_model(seed=1).save(tmp_path / "model.keras")
    make_model(seed=1).save_weights(tmp_path / "model.weights.h5")
    model = make_model()
    content = (tmp_path / name).read_bytes()
    for length in (0, 1, 100, len(content) // 3, len(content) // 2, len(content) - 1):
        (tmp_path / name).write_bytes(content[:length])
        assert_refused(keras_moe.load_weights, model, tmp_path / name)
        assert_refused(keras.Model.load_weights, model, tmp_path / name)  # finds it at once
    with pytest.raises((ValueError, OSError, zipfile.BadZipFile)):
        keras.models.load_model(tmp_path / name)


def test_every_flipped_bit_of_gating_and_experts_is_found(tmp_path):
    intact, damaged = tmp_path / "intact.weights.h5", tmp_path / "damaged.weights.h5"
    make_model(seed=1).save_weights(intact)
    model = make_model()
    moe = model.get_layer("moe")
    rng = np.random.default_rng(0)
    for place in mixture_data(intact):
        for position in rng.choice(place, size=6):
            shutil.copy(intact, damaged)
            flip(damaged, position, rng.integers(8))
            assert_refused(keras_moe.load_weights, model, damaged, ValueError, "is damaged")
    # Keras alone loads the rest, but reports it, and the part with the damage keeps its weights.
    (name,) = [name for name, place in datasets(damaged).items() if position in place]
    part = moe.gating if "/gating/" in name else moe.experts
    rest = model.layers[0]
    before, rest_before = bits(part), bits(rest)
    with pytest.raises(ValueError, match="is damaged"):
        model.load_weights(damaged)
    assert bits(part) == before
    assert bits(rest) != rest_before


def test_every_flipped_bit_of_an_archive_is_found(tmp_path):
    intact, damaged = tmp_path / "intact.keras", tmp_path / "damaged.keras"
    make_model(seed=1).save(intact)
    model = make_model()
    rng = np.random.default_rng(0)
    content = intact.read_bytes()
    with zipfile.ZipFile(intact) as archive:
        infos = archive.infolist()
    # A member's data end where the next member's header begins, and the last one's where the
    # directory does: the bytes shortly before that belong to the data.
    ends = [info.header_offset for info in infos[1:]] + [content.index(b"PK\x01\x02")]
    for info, end in zip(infos, ends, strict=True):
        assert info.compress_size == info.file_size  # stored as it is
        for position in rng.integers(end - info.file_size, end, size=8):
            shutil.copy(intact, damaged)
            flip(damaged, position, rng.integers(8))
            assert_refused(
                keras_moe.load_weights, model, damaged, zipfile.BadZipFile, info.filename
            )


def test_load_model_reports_damage_that_the_archive_does_not_know(tmp_path):
    intact, damaged = tmp_path / "intact.keras", tmp_path / "damaged.keras"
    make_model().save(intact)
    weights = tmp_path / "model.weights.h5"
    with zipfile.ZipFile(intact) as source, zipfile.ZipFile(damaged, "w") as target:
        weights.write_bytes(source.read(weights.name))
        flip(weights, mixture_data(weights)[0][0], 6)
        for info in source.infolist():
            content = source.read(info)
            target.writestr(
                info, weights.read_bytes() if info.filename == weights.name else content
            )
    with pytest.raises(ValueError, match="(?s)could not be loaded.*is damaged"):
        keras.models.load_model(damaged)
    assert_refused(keras_moe.load_weights, make_model(seed=1), damaged, ValueError, "is damaged")


@pytest.mark.parametrize("load", [keras.Model.load_weights, keras_moe.load_weights])
def test_a_wrong_number_of_experts_names_both(load, tmp_path):
    path = tmp_path / "model.weights.h5"
    make_model(layer=keras_moe.SparseMoE(16, 4)).save_weights(path)
    model = make_model(layer=keras_moe.SparseMoE(8, 4, name="moe"))
    moe = model.get_layer("moe")
    before = bits(moe)
    with pytest.raises(ValueError, match="holds 16 experts.*has 8.*keras_moe.grow and keras_moe.p"):
        load(model, path)
    assert bits(moe) == before


def test_a_gating_names_its_number_too():
    store = {}
    gating = {n: keras_moe.HierarchicalGating(n, 2, k=(1, 1), name="gating") for n in (4, 3)}
    for layer in gating.values():
        layer.build((None, WIDTH))
    gating[4].save_own_variables(store)
    with pytest.raises(ValueError, match="holds 4 groups, the layer 'gating' has 3"):
        gating[3].load_own_variables(store)


@pytest.mark.parametrize(
    ("saved", "loading", "message"),
    [
        (
            lambda: keras_moe.SparseMoE(8, 4),
            lambda: keras_moe.SparseMoE(8, 5),
            r"other shapes.*\(8, 6, 4\) for kernel_0 \(8, 6, 5\)",
        ),
        (
            # N and F differ: not the number of experts alone.
            lambda: keras_moe.SparseMoE(8, 4),
            lambda: keras_moe.SparseMoE(4, 5),
            r"other shapes.*\(8, 4, 6\) for kernel_1 \(4, 5, 6\)",
        ),
        (
            lambda: keras_moe.SparseMoE(8, 4, gating="softmax"),
            lambda: keras_moe.SparseMoE(8, 4),
            r"'gating' differ in the number of variables.*1 variables; the layer has 2: gate_ker",
        ),
        (
            lambda: keras_moe.SparseMoE(8, 4),
            lambda: keras_moe.SparseMoE(8, 4, gating="softmax"),
            r"'gating' differ in the number of variables.*2 variables; the layer has 1: gate_ker",
        ),
        (
            lambda: keras_moe.SparseMoE(8, 4, use_bias=True),
            lambda: keras_moe.SparseMoE(8, 4),
            r"'experts' differ in the number of variables.*4 variables; the layer has 2",
        ),
        (
            lambda: keras_moe.HierarchicalMoE(4, 2, 4, k=(2, 1)),
            lambda: keras_moe.HierarchicalMoE(2, 4, 4, k=(2, 1)),
            r"other shapes.*\(6, 4\) for primary \(6, 2\)",
        ),
        (
            lambda: keras.layers.Dense(WIDTH),
            lambda: keras_moe.SparseMoE(8, 4),
            r"'experts' differ in the number of variables.*0 variables; the layer has 2",
        ),
    ],
)
def test_files_of_another_layer_are_refused(saved, loading, message, tmp_path):
    path = tmp_path / "model.weights.h5"
    make_model(layer=saved()).save_weights(path)
    assert_refused(keras_moe.load_weights, make_model(layer=loading()), path, ValueError, message)


def test_an_error_brings_back_weights_and_optimizer(tmp_path):
    path = tmp_path / "model.weights.h5"
    trained(8, epochs=2).save_weights(path)
    model = trained(4, epochs=1)
    assert_refused(keras_moe.load_weights, model, path, ValueError, "holds 8 experts")
    # What it saves from: Keras' own method has by then loaded the layers that fit.
    before = bits(model)
    with pytest.raises(ValueError, match="holds 8 experts"):
        model.load_weights(path)
    assert bits(model) != before


def test_an_interrupt_brings_the_weights_back(tmp_path, monkeypatch):
    path = tmp_path / "model.weights.h5"
    make_model(seed=1).save_weights(path)
    model = make_model()
    last = model.layers[-1]
    load = last.load_own_variables

    def interrupted_once(store):
        monkeypatch.setattr(last, "load_own_variables", load)
        raise KeyboardInterrupt

    monkeypatch.setattr(last, "load_own_variables", interrupted_once)
    assert_refused(keras_moe.load_weights, model, path, KeyboardInterrupt)


def test_layers_without_variables_say_so():
    gating = keras_moe.NoisyTopKGating(8, 2)
    gating.build((None, WIDTH))
    store = {}
    gating.save_own_variables(store)
    with pytest.raises(ValueError, match="2 variables; the layer has 0"):
        keras_moe.NoisyTopKGating(8, 2).load_own_variables(store)
