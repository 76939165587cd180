"""Recomputation by others: `tf.recompute_grad` and `keras.remat` around a mixture.

Both run a function forward without recording it for gradients, and once more in the backward pass.
So gradients come for what the function returns, but not for the balance losses, which leave it
another way, and noise would be drawn anew.

What this needs of TensorFlow and is not public stands in this one file, checked with
TensorFlow 2.19 to 2.21: whether recording is stopped, how it starts again, and the arguments of
such a function, which the frames on Python's stack have.
"""

import contextlib
import sys
import threading
import types

import tensorflow as tf
from tensorflow.python import pywrap_tfe

_MOST_KEPT = 256  # Calls whose seeds are kept for a backward pass.

_local = threading.local()


@contextlib.contextmanager
def recording(x):
    """Inside, what is made of `x` is recorded, though a function around it may not be.

    That the gradients go on from `x`, it must be an argument of this function: of what the function
    itself has made of its arguments nothing is recorded.
    """
    before = getattr(_local, "state", None)
    calls = _calls() if pywrap_tfe.TFE_Py_TapeSetIsStopped() else []
    forward = [args for again, args in calls if not again]
    recorded = forward and all(any(x is arg for arg in tf.nest.flatten(args)) for args in forward)
    _local.state = ("recorded" if recorded else "lost") if forward else None
    if recorded:
        pywrap_tfe.TFE_Py_TapeSetRestartOnThread()
    try:
        yield
    finally:
        if recorded:
            pywrap_tfe.TFE_Py_TapeSetStopOnThread()
        _local.state = before


@contextlib.contextmanager
def unrecorded():
    """Inside, nothing is recorded that `recording` has made be recorded."""
    stopped = getattr(_local, "state", None) == "recorded"
    if stopped:
        pywrap_tfe.TFE_Py_TapeSetStopOnThread()
    try:
        yield
    finally:
        if stopped:
            pywrap_tfe.TFE_Py_TapeSetRestartOnThread()


def is_lost():
    """Whether what is computed inside of `recording` has no gradient all the same."""
    return getattr(_local, "state", None) == "lost"


class Draws:
    """Seeds that a recomputed function gets again when it runs again."""

    def __init__(self):
        self._kept = {}

    def next(self, draw):
        """Returns what the function `draw` returns, or has returned the first time."""
        calls = _calls()
        seed = None
        for number, (again, args) in enumerate(calls):
            if again:
                seed = self._take(args)
                calls = calls[:number]
                break
        if seed is None:
            seed = draw()
        for _, args in calls:
            self._keep(args, seed)
        return seed

    def _keep(self, args, seed):
        # The same place in memory may have had the arguments of another call.
        seeds, number_taken = self._kept.pop(id(args), ([], 0))
        self._kept[id(args)] = ([seed], 0) if number_taken else ([*seeds, seed], 0)
        if len(self._kept) > _MOST_KEPT:
            del self._kept[next(iter(self._kept))]

    def _take(self, args):
        if id(args) not in self._kept:
            return None
        seeds, number_taken = self._kept[id(args)]
        self._kept[id(args)] = seeds, number_taken + 1
        return seeds[number_taken % len(seeds)]  # A persistent tape runs it several times.


def _calls():
    """The recomputed functions that are running, innermost first.

    Returns:
        List of pairs: whether the function runs again, for the backward pass; and its arguments
        the first time, a tuple, the same object both times.
    """
    calls, frame = [], sys._getframe(1)
    while frame is not None:
        if frame.f_code is _FORWARD or frame.f_code is _AGAIN:
            calls.append((frame.f_code is _AGAIN, frame.f_locals["args"]))
        frame = frame.f_back
    return calls


def _inner_function(code, name):
    inner = getattr(code, "co_consts", ())
    return next((c for c in inner if isinstance(c, types.CodeType) and c.co_name == name), None)


_FORWARD = _inner_function(tf.recompute_grad.__code__, "inner")
_AGAIN = _inner_function(_inner_function(_FORWARD, "grad_wrapper"), "inner_recompute_grad")
