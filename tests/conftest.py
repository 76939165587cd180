"""What holds for all tests."""

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def frozen_heap():
    """Has the garbage collector pass over what imports and earlier test files have left.

    That is over a million objects, since TensorFlow keeps every graph with a custom gradient. Keras
    collects whenever a variable of a layer is deleted: `quantize` would take ten times as long.
    """
    gc.collect()
    gc.freeze()
