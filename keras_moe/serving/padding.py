"""Whether a model's answers are the same however far its ids are padded."""

import keras
import ml_dtypes
import numpy as np
import tensorflow as tf

from keras_moe.serving.internals import layers_within

_LENGTHS = (1, 2, 3, 3)  # of the rows that it is tried with
_WIDTH, _FURTHER = max(_LENGTHS), 2


def outputs_along(function, model, specs, tokens):
    """Calls a function with a few random ids, padded more and less far.

    Args:
        function: Called with a list of all inputs, returns a dict of tensors.
        model: The model that it calls, or the function that the caller knows.
        specs: List of `tf.TensorSpec`s, all inputs.
        tokens: List of `TokenInput`s or `None`, of the same length.

    Returns:
        Dict from names of outputs to the place in `tokens` of the input that they have a position
        for each id of, [B, L, ...]. Of inputs of one width alone nothing is told.

    Raises:
        ValueError: If an answer depends on the padding, or there is none for each row.
    """
    rng = np.random.default_rng(0)
    inputs = [_random(rng, *pair) for pair in zip(specs, tokens, strict=True)]

    def answers(inputs):
        with keras.StatelessScope():  # Nothing that a call updates is kept.
            outputs = function([tf.constant(x) for x in inputs])
        return {name: tf.convert_to_tensor(y).numpy() for name, y in outputs.items()}

    near, along, epsilon = answers(inputs), {}, _precision_of(model)
    for name, output in near.items():
        if output.ndim == 0 or len(output) != len(_LENGTHS):
            raise ValueError(
                "An output must have an entry for each row of ids, so that a row with a fault has "
                f"an answer of its own. Received: {name!r} of shape {output.shape} for "
                f"{len(_LENGTHS)} rows"
            )
    for i, (spec, token) in enumerate(zip(specs, tokens, strict=True)):
        if token is None or token.lengths_name is None:
            continue
        padded = list(inputs)
        padded[i] = np.pad(inputs[i], [(0, 0), (0, _FURTHER)])
        for name, far in answers(padded).items():
            close, inside = near[name], _inside()
            if far.ndim > 1 and (close.shape[1], far.shape[1]) == (_WIDTH, _WIDTH + _FURTHER):
                along[name] = i
                close, far = close[inside], far[:, :_WIDTH][inside]
            if close.shape != far.shape or not _same(close, far, epsilon):
                raise ValueError(
                    "Ids are padded with 0 up to the longest row of a batch, and the answer to a "
                    "row must not depend on it: have layers mask it, as by `mask_zero=True` of "
                    f"`keras.layers.Embedding`. Received: {model!r}, whose {name!r} does depend "
                    f"on how far {spec.name!r} is padded"
                )
    return along


def _inside():
    """Which positions of the rows count."""
    return np.arange(_WIDTH) < np.array(_LENGTHS)[:, None]


def _random(rng, spec, token):
    """Values of an input for each of the rows."""
    number = len(_LENGTHS)
    shape = [number, *(size or _WIDTH for size in spec.shape[1:])]
    if token is not None:
        ids = rng.integers(min(1, token.vocabulary_size - 1), token.vocabulary_size, shape)
        if token.lengths_name is not None:
            ids *= _inside()
        return ids.astype(spec.dtype.as_numpy_dtype)
    if spec.dtype.is_floating:
        return rng.normal(size=shape).astype(spec.dtype.as_numpy_dtype)
    return np.zeros(shape, spec.dtype.as_numpy_dtype)  # False, 0 or an empty string


def _precision_of(model):
    """The largest distance of neighbours near 1 among the types that a model computes in."""
    layers = layers_within(model) if isinstance(model, keras.layers.Layer) else []
    dtypes = {layer.compute_dtype for layer in layers} | {keras.config.dtype_policy().compute_dtype}
    narrow = dtypes & {"bfloat16", "float16"} or {"float32"}
    return max(float(ml_dtypes.finfo(dtype).eps) for dtype in narrow)


def _same(a, b, epsilon):
    if not tf.as_dtype(a.dtype).is_floating:
        return np.array_equal(a, b)
    a, b = a.astype("float64"), b.astype("float64")
    # Products of other shapes round otherwise; padding changes far more.
    tolerance = min(512 * epsilon, 0.03) * np.abs(a[np.isfinite(a)]).max(initial=0)
    return np.allclose(a, b, rtol=0, atol=tolerance, equal_nan=True)
