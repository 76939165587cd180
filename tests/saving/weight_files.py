"""Weight files, intact and damaged: what the tests of saving and loading share."""

import h5py
import keras
import pytest


def bits(model):
    variables = list(model.weights)
    if getattr(model, "optimizer", None) is not None:
        variables += model.optimizer.variables
    return [keras.ops.convert_to_numpy(variable).tobytes() for variable in variables]


def assert_refused(load, model, path, error=Exception, match=None):
    before = bits(model)
    with pytest.raises(error, match=match):
        load(model, path)
    assert bits(model) == before


def flip(path, position, bit):
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


def datasets(path):
    """All arrays in a weight file by name: the range of each one's places in the file."""
    places = {}

    def collect(name, item):
        if isinstance(item, h5py.Dataset):
            start = item.id.get_offset()
            places[name] = range(start, start + item.id.get_storage_size())

    with h5py.File(path) as file:
        file.visititems(collect)
    return places
