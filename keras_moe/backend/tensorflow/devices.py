"""The choice between two ways of computing the same, by the device that runs it.

On a CPU a loop that starts many small operations is cheap, and every operation that is saved is
time. On a GPU it takes longer to start a small operation than to compute it, and whatever the host
has to compute, or to know, stops the card. So a graph has both ways where there is a GPU, or may be
one, as in an export. The device chooses between them when it runs.
"""

import contextlib
import contextvars

import tensorflow as tf

from keras_moe.backend.tensorflow import xla
from keras_moe.backend.tensorflow.tracing import tracing_saved_model
from keras_moe.backend.tensorflow.vectorization import turn_by_turn

_NAMES = ["GPU"]
_for_any_device = contextvars.ContextVar("for_any_device", default=False)
_chosen = contextvars.ContextVar("chosen", default=None)


def by_device(cpu, gpu):
    """Calls one of two functions, which compute the same.

    Both are traced into a graph, and called once each. In eager mode, inside of either, and where
    no GPU can be meant, nothing is left to choose. XLA, which compiles for one device and fuses by
    itself, gets `cpu`. Gradients pass, but a custom gradient around the call is better: TensorFlow
    hands every value between the two passes out of both branches.

    Args:
        cpu: Function without arguments, from tensors to tensors by what it closes over: the way
            for CPUs, and for whatever is no GPU.
        gpu: The same for GPUs. Its results have the structure and dtypes of those of `cpu`.

    Returns:
        The results.
    """
    if _chosen.get() is not None:
        return (cpu, gpu)[_chosen.get()]()
    if is_for_cpu():
        return _inside(0, cpu)()
    # The operation knows the device that it runs on: 0, the first name, or 1, the number of names.
    index = tf.raw_ops.DeviceIndex(device_names=_NAMES)
    ways = [_inside(1, gpu), _inside(0, cpu)]
    if tf.executing_eagerly():
        return ways[int(index)]()
    results = tf.switch_case(index, ways)
    turn_by_turn(tf.nest.flatten(results)[0].op.inputs[0])  # TensorFlow hands on copies.
    return results


def is_for_cpu():
    """Whether `by_device` calls `cpu` here, whatever the device will be."""
    if _chosen.get() is not None:
        return _chosen.get() == 0
    gpu_is_here = any(tf.config.list_logical_devices(name) for name in _NAMES)
    may_run_on_gpu = gpu_is_here or _for_any_device.get() or tracing_saved_model()
    return xla.compiling() or not may_run_on_gpu


@contextlib.contextmanager
def for_any_device(training):
    """Inside, where `training` is `None`, graphs have both ways, though there is no GPU here.

    So are models called to be exported. Training, evaluation and prediction say which they are, and
    their graphs stay where they were made: without a GPU they need no way for one, which would take
    longer to trace than all else.
    """
    token = _for_any_device.set(_for_any_device.get() or training is None)
    try:
        yield
    finally:
        _for_any_device.reset(token)


same = tf.identity  # the tensor, as a value of the function that is being traced


def _inside(choice, function):
    def call():
        with choosing(choice):
            return function()

    return call


def captured(tensors):
    """The same tensors as values of the branch that is being traced.

    A custom gradient inside of a branch must close over nothing but these: where gradients have
    gradients, TensorFlow finds nothing else (seen with 2.21).
    """
    return tf.nest.map_structure(lambda x: tf.identity(x) if tf.is_tensor(x) else x, tensors)


@tf.custom_gradient
def densified(x):
    """`x`, with a dense gradient: in all branches gradients must be of the same kind."""
    return tf.identity(x), tf.convert_to_tensor


@contextlib.contextmanager
def choosing(choice):
    """Inside, `by_device` calls `cpu` for 0 and `gpu` for 1, whatever the device; for tests."""
    token = _chosen.set(choice)
    try:
        yield
    finally:
        _chosen.reset(token)
