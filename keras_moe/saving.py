"""Weight files: nothing damaged and nothing of another shape gets into a layer."""

import functools
import os
import shutil
import tempfile
import zipfile
import zlib

import keras
import numpy as np
from keras import ops

from keras_moe.backend import collectives

_CHECKSUMS, _NUMBER = "checksums", "num_experts"
_SEAL, _SEAL_SIZE = b"keras_moe weights, crc32 ", 512


class CheckedVariables:
    """Stores the variables of a layer with checksums, and checks all of them before it loads one.

    A class that a layer inherits from before `keras.layers.Layer`. Files written without checksums
    load as well, their number of variables and shapes checked.

    Attributes:
        unit: What `expert_axis` counts, for the error messages.
    """

    unit = "experts"

    def expert_axis(self, variable):
        """Along which axis a variable has one entry for each expert.

        Args:
            variable: A variable of the layer.

        Returns:
            The axis, or `None` for a variable that all experts share.
        """
        return None

    def save_own_variables(self, store):
        checksums = []
        for key, variable in self._own_variables().items():
            value = ops.convert_to_numpy(variable)
            store[key] = value
            checksums.append(_checksum(value))
        if checksums:
            store[_CHECKSUMS] = np.array(checksums, "uint32")

    def load_own_variables(self, store):
        own = self._own_variables()
        # Read twice, so that no more than one variable is held in memory beside the layer's own.
        self._check_store(store, own)
        for key, variable in own.items():
            variable.assign(store[key])

    def _own_variables(self):
        """The variables by the keys that Keras gives them, those of sublayers left out."""
        own = {}
        super().save_own_variables(own)
        return own

    def _check_store(self, store, own):
        keys = set(store.keys()) - {_CHECKSUMS}
        if keys != own.keys():
            names = ", ".join(f"{v.name} {tuple(v.shape)}" for v in own.values())
            raise ValueError(
                f"The file and the layer {self.name!r} differ in the number of variables. Build "
                "the model with the configuration of the saved one before loading. Received: "
                f"{len(keys)} variables; the layer has {len(own)}{': ' if own else ''}{names}"
            )
        if not own:
            return
        shapes, checksums = [], []
        for key in own:
            value = store[key]
            shapes.append(value.shape)
            checksums.append(_checksum(value))
        self._check_shapes(own.values(), shapes)
        if _CHECKSUMS in store.keys():
            stored = np.asarray(store[_CHECKSUMS]).tolist()
            if stored != checksums:
                _refuse_damaged(self, checksums, stored)

    def _check_shapes(self, variables, shapes):
        wrong = [(v, s) for v, s in zip(variables, shapes, strict=True) if tuple(v.shape) != s]
        if not wrong:
            return
        sizes = {self._other_size(variable, shape) for variable, shape in wrong}
        if None not in sizes and len(sizes) == 1:
            ((received, wanted),) = sizes
            _refuse_number(self, self.unit, received, wanted)
        raise ValueError(
            f"The file holds other shapes than the layer {self.name!r} has. Build the model with "
            "the configuration of the saved one before loading. Received: "
            + ", ".join(f"{s} for {v.name} {tuple(v.shape)}" for v, s in wrong)
        )

    def _other_size(self, variable, shape):
        """(N of the file, N of the layer) where a shape differs in that alone, else `None`."""
        axis = self.expert_axis(variable)
        if axis is None or len(shape) != len(variable.shape):
            return None
        resized = (*variable.shape[:axis], shape[axis], *variable.shape[axis + 1 :])
        return (shape[axis], variable.shape[axis]) if shape == resized else None


class CheckedExperts:
    """Stores the number of a bank's `layers`, and checksums of all that these layers store.

    A class that a bank inherits from before `keras.layers.Layer`. The layers may be of any class,
    and save and load as that does. But Keras loads the bank before them, so that the bank can tell
    each of them what it may load. Files without number and checksums load as well.
    """

    def save_own_variables(self, store):
        super().save_own_variables(store)
        values = [value for _, own in _parts(self.layers) for value in own.values()]
        store[_NUMBER] = len(self.layers)
        store[_CHECKSUMS] = np.array([_checksum(ops.convert_to_numpy(v)) for v in values], "uint32")

    def load_own_variables(self, store):
        own = {key: np.asarray(store[key]) for key in store.keys()}  # Keras 3.10 has datasets.
        if _NUMBER in own:
            number, checksums = int(own.pop(_NUMBER)), own.pop(_CHECKSUMS).tolist()
            same = number == len(self.layers)
            for part, _ in _parts(self.layers):
                part.load_own_variables = functools.partial(
                    _load_expected, part, set(checksums if same else [])
                )
            if not same:
                _refuse_number(self, "experts", number, len(self.layers))
        super().load_own_variables(own)


def _load_expected(layer, expected, store):
    """`layer.load_own_variables(store)`, of values with the expected checksums alone."""
    own = {key: store[key] for key in store.keys()}
    checksums = [_checksum(value) for value in own.values()]
    if not expected.issuperset(checksums):
        _refuse_damaged(layer, checksums, sorted(expected))
    # The method of the class is back only now, since Keras tries again what has failed.
    del layer.load_own_variables
    layer.load_own_variables(own)


def _parts(value, seen=None):
    """Yields the layers with variables of their own, and what they save of them.

    They are found where Keras looks for them: in attributes of layers, in lists, tuples and dicts.
    """
    seen = set() if seen is None else seen
    children = ()
    if isinstance(value, keras.layers.Layer):
        own = {}
        value.save_own_variables(own)
        if own:
            yield value, own
        children = vars(value).values()
    elif isinstance(value, dict):
        children = value.values()
    elif isinstance(value, (list, tuple)):
        children = value
    for child in list(children):
        if id(child) not in seen:
            seen.add(id(child))
            yield from _parts(child, seen)


def save_weights(model, filepath):
    """Writes a weight file in which `load_weights` finds any damage, whatever layer it is in.

    The file is that of `model.save_weights`, behind a checksum of all its bytes.
    `model.load_weights` and whatever else reads HDF5 skip that, and do not check it.

    Of several workers (`tf.distribute.MultiWorkerMirroredStrategy`) all call this, as each may have
    experts that the others lack, and the chief writes the file.

    Example:
    ```python
    keras_moe.save_weights(model, "model.weights.h5")
    ```

    Args:
        model: A built model.
        filepath: Path that ends in `.weights.h5`. A file that is there is replaced.

    Raises:
        ValueError: If the path ends otherwise.
    """
    if not str(filepath).endswith(".weights.h5"):
        raise ValueError(
            "The path must end in `.weights.h5`; `model.save` writes `.keras` files, which have "
            f"checksums of their own. Received: {filepath}"
        )
    with tempfile.TemporaryDirectory() as folder:
        unsealed = os.path.join(folder, "unsealed.weights.h5")
        model.save_weights(unsealed)
        if not collectives.is_chief(getattr(model, "distribute_strategy", None)):
            return
        with open(unsealed, "rb") as source, open(filepath, "wb") as target:
            target.write(_seal(source))
            source.seek(0)
            shutil.copyfileobj(source, target)


def load_weights(model, filepath):
    """Loads a weight file completely or not at all.

    `model.load_weights` raises an error when the file is cut off, when a shape is wrong, or when
    the bytes of a gating or of experts do not match their checksums. Such a layer stays as it was,
    but Keras loads all others, and leaves a mixture of two models behind. After an error of this
    function every weight of the model and every variable of its optimizer is what it was before:
    they are saved to a temporary file first, and put back. Memory holds no second copy of them,
    but the folder for temporary files needs the room.

    Of a file by `keras_moe.save_weights`, and of a `.keras` file, every byte is checked before
    anything is loaded. A `.weights.h5` by `model.save_weights` has checksums for the layers of
    keras_moe alone: a flipped bit in the weights of another layer makes another weight, and no
    error.

    Example:
    ```python
    keras_moe.load_weights(model, "model.weights.h5")
    ```

    Args:
        model: A built model.
        filepath: Path of a file that `keras_moe.save_weights`, `model.save_weights` or `model.save`
            has written.

    Raises:
        ValueError: If the file or a variable does not match its checksum, or the file has other
            variables or other shapes than the model.
        OSError: If the file cannot be opened or read, as one that is cut off.
        zipfile.BadZipFile: If a `.keras` file is damaged.
    """
    if str(filepath).endswith(".keras"):
        _check_archive(filepath)
    elif os.path.isfile(filepath):
        _check_seal(filepath)
    with tempfile.TemporaryDirectory() as folder:
        before = os.path.join(folder, "before.weights.h5")
        model.save_weights(before)
        try:
            model.load_weights(filepath)
        except BaseException:  # An interrupt, too, would leave half of a file loaded.
            model.load_weights(before)
            raise


def _seal(file):
    """The checksum of what is left to read of a file, as a block that HDF5 allows before a file."""
    checksum = 0
    while piece := file.read(1 << 20):
        checksum = zlib.crc32(piece, checksum)
    return (_SEAL + b"%08x\n" % checksum).ljust(_SEAL_SIZE, b"\0")


def _check_seal(filepath):
    with open(filepath, "rb") as file:
        seal = file.read(_SEAL_SIZE)
        if seal.startswith(_SEAL) and seal != _seal(file):
            raise ValueError(
                "The file is damaged, or was changed: its bytes do not match the checksum that "
                "keras_moe.save_weights wrote at its beginning. Take another copy of the file. "
                f"Received: {filepath}"
            )


def _check_archive(filepath):
    # Keras reads the archive piece by piece, whereby Python's zipfile may skip the checksum.
    with zipfile.ZipFile(filepath) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(
            f"The file is damaged: {damaged!r} does not match its checksum in the archive. Take "
            f"another copy of the file. Received: {filepath}"
        )


def _refuse_number(layer, unit, received, wanted):
    raise ValueError(
        f"The file holds {received} {unit}, the layer {layer.name!r} has {wanted}. Load it into a "
        "layer of the same number; keras_moe.grow and keras_moe.prune change the number explicitly."
    )


def _refuse_damaged(layer, received, stored):
    raise ValueError(
        f"The file is damaged: what it holds for the layer {layer.name!r} does not match the "
        "checksums that were stored with it. Take another copy of the file. Received: checksums "
        f"{received}, stored {stored}"
    )


def _checksum(value):
    return zlib.crc32(np.ascontiguousarray(value).reshape(-1).view("uint8"))
