"""Asks a SavedModel through `saved_model_server.c`: TensorFlow's C API, no Python and no Keras."""

import pathlib
import struct
import subprocess

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

SOURCE = pathlib.Path(__file__).parent / "saved_model_server.c"


def compile_server(program):
    """Compiles the C program against the headers and libraries of the installed wheel."""
    wheel = pathlib.Path(tf.__file__).parent
    libraries = ("-l:libtensorflow_cc.so.2", "-l:libtensorflow_framework.so.2")
    linking = (f"-L{wheel}", *libraries, f"-Wl,-rpath,{wheel}", "-o", program)
    warnings = ("-std=c99", "-Wall", "-Wextra", "-Werror")
    subprocess.run(["gcc", *warnings, SOURCE, f"-I{wheel}/include", *linking], check=True)
    return program


class Server:
    """A process of the C program.

    Args:
        program: What `compile_server` returns.
        path: Folder of a version.
        libraries: Files of operations that TensorFlow itself lacks.
    """

    def __init__(self, program, path, libraries=()):
        saved_model = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
        self._signatures = saved_model.meta_graphs[0].signature_def
        self.process = subprocess.Popen(
            [program, path, *libraries],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def ask(self, signature, **request):
        """The answer, a dict of arrays, or the error, a tuple of its code and its message."""
        known = self._signatures[signature]
        message = _numbers(len(request))
        for name, value in request.items():
            message += _name(known.inputs[name]) + _tensor(value)
        message += _numbers(len(known.outputs)) + b"".join(map(_name, known.outputs.values()))
        self.process.stdin.write(message)
        self.process.stdin.flush()
        code = self._number()
        if code != 0:
            return code, self._bytes().decode()
        return {name: self._read_tensor() for name in known.outputs}

    def close(self):
        """Ends the process and returns its exit status."""
        self.process.communicate()
        return self.process.returncode

    def _number(self):
        (number,) = struct.unpack("=q", self.process.stdout.read(8))
        return number

    def _bytes(self):
        return self.process.stdout.read(self._number())

    def _read_tensor(self):
        dtype = tf.as_dtype(self._number())
        shape = [self._number() for _ in range(self._number())]
        if dtype == tf.string:
            strings = [self._bytes() for _ in range(int(np.prod(shape)))]
            return np.array(strings, object).reshape(shape)
        return np.frombuffer(self._bytes(), dtype.as_numpy_dtype).reshape(shape)


def _numbers(*numbers):
    return struct.pack(f"={len(numbers)}q", *numbers)


def _counted(data):
    return _numbers(len(data)) + data


def _name(info):
    operation, index = info.name.split(":")
    return _counted(operation.encode()) + _numbers(int(index))


def _tensor(value):
    dtype = tf.as_dtype(value.dtype)
    message = _numbers(dtype.as_datatype_enum, value.ndim, *value.shape)
    if dtype == tf.string:
        return message + b"".join(map(_counted, value.ravel()))
    return message + _counted(value.tobytes())
