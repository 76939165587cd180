"""How TensorFlow Serving puts requests together, told in NumPy (`batching_util.cc` of 2.20)."""

import numpy as np


def merged(requests):
    """One request of several, with `pad_variable_length_inputs: true`.

    Of each input all axes but the first are padded up to the largest, with the first entry of that
    request, whatever it means.
    """
    batch = {}
    for name in requests[0]:
        values = [request[name] for request in requests]
        widest = np.max([value.shape[1:] for value in values], axis=0).astype(int)
        batch[name] = np.concatenate([_padded(value, widest) for value in values])
    return batch


def _padded(value, widest):
    behind = [(0, 0), *((0, size) for size in widest - value.shape[1:])]
    return np.pad(value, behind, constant_values=value.flat[0])


def split(answer, requests):
    """The answer of each request: its rows of all outputs."""
    sizes = [len(next(iter(request.values()))) for request in requests]
    ends = np.cumsum(sizes)[:-1]
    parts = {name: np.split(value, ends) for name, value in answer.items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(len(requests))]
