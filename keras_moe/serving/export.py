"""`export_saved_model`: writes a model as TensorFlow Serving runs it."""

import keras
import tensorflow as tf

from keras_moe.serving import server_files as files
from keras_moe.serving import signatures as tracing
from keras_moe.serving import versions
from keras_moe.serving import warm_up as warming
from keras_moe.serving.token_signature import token_signature
from keras_moe.serving.weights import StoredWeights


def export_saved_model(
    model,
    path,
    version=None,
    signatures=None,
    *,
    lengths=False,
    track=(),
    dtype=None,
    warm_up=None,
    server_files=False,
):
    """Exports a model for TensorFlow Serving, as the next version in its folder.

    A version is a SavedModel: graphs and weights, which TensorFlow runs without Keras, keras_moe or
    Python. It appears under its number when it is complete, so that a server never reads a part of
    one; an export that is killed leaves a hidden folder `.unfinished-…` behind, which may be
    deleted. Several processes may export at the same time: each gets a version of its own.

    The signatures hold what answers a request and nothing else: no noise, no dropping, no state of
    seeds, metrics or the optimizer, nothing that is written. What a mixture answers to an example
    doesn't depend on the rest of the batch, but for the rounding of its last digits, no more than
    of a dense layer's, and few examples read the chosen feed-forward experts' weights alone.
    Whoever loads a version can take gradients of its answers.

    Example:
    ```python
    def top(tokens):
        probabilities, classes = tf.math.top_k(model(tokens), 3)
        return {"classes": classes, "probabilities": probabilities}

    tokens = tf.TensorSpec([None, None], "int32", "tokens")
    keras_moe.export_saved_model(
        model,
        "saved_models/reviews",
        signatures={"serving_default": (model, [tokens]), "top": (top, [tokens])},
    )
    # tensorflow_model_server --model_name=reviews --model_base_path=$PWD/saved_models/reviews
    ```

    Args:
        model: A built model or layer. One built inside the scope of a `tf.distribute` strategy
            is exported for one device.
        path: Folder of the model, on a local disk, with a folder for each version. It is created
            where it is missing.
        version: Integer of at least 1. Default: the one after the last. A version that is there
            is not replaced.
        signatures: Dict from names to pairs of a function and its input signature, as
            `keras.export.ExportArchive.add_endpoint` takes them: a list with a `tf.TensorSpec`, or
            a structure of them, for each argument. The function is traced once, without AutoGraph;
            it returns tensors by name, or one, which then is called `outputs`. An input has the
            name of its spec, or else of the function's argument. Without `"serving_default"` among
            them that is the model's own call, its inputs named as its `keras.Input`s, or `inputs`.
        lengths: Whether the model's own call takes ids of tokens and how many of them each row has,
            as `token_signature` makes it. Where a server puts requests of different lengths
            together, nothing else is safe but strings.
        track: List of what the functions use besides the model: other layers, lookup tables.
        dtype: `"bfloat16"` stores float32 matrices in half the room, gatings excepted, and
            computes in the model's precision. `None` stores all weights as they are: also in int8,
            where `model.quantize` has made them so.
        warm_up: Requests that a server answers before it lets the version take the place of the
            one before: dict from names of signatures to a dict from names of inputs to values, or
            to a list of such dicts. Takes `pip install keras_moe[serving]`.
        server_files: Whether to write, beside the versions, `batching_parameters.txt` and
            `monitoring_config.txt` for TensorFlow Serving. Files that are there stay as they are.

    Returns:
        A `pathlib.Path`, the folder of the version.

    Raises:
        ValueError: If the model is not built; if the version is there; if a signature has an input
            without a name, a scalar output, random numbers, state that it writes, a Python
            function or `jit_compile`; if a warm-up request doesn't fit its signature.
        ImportError: If `warm_up` is given and tensorflow-serving-api is not installed.
    """
    versions.check_target(path, version)
    if not model.built:
        raise ValueError(f"Call or build {model.name!r} first: it has no weights to export.")
    if dtype not in (None, "bfloat16"):
        raise ValueError(f'`dtype` must be "bfloat16" or `None`. Received: {dtype!r}')

    signatures = dict(signatures or {})
    if "serving_default" not in signatures:
        own = token_signature if lengths else tracing.of_model
        signatures["serving_default"] = own(model)
    elif lengths:
        raise ValueError(
            "`lengths` is for the model's own call: leave `serving_default` out, or make it by "
            f"`keras_moe.serving.token_signature`. Received: signatures={signatures!r}"
        )
    layers = [part for part in (model, *track) if isinstance(part, keras.layers.Layer)]
    weights = StoredWeights(layers, dtype)
    traced = {name: tracing.trace(name, pair, weights) for name, pair in signatures.items()}
    records = warming.make_records(warm_up, traced) if warm_up else []

    functions = {name: signature.function for name, signature in traced.items()}
    root = tf.Module()
    root.stored = list({id(v): v for f in functions.values() for v in f.variables}.values())
    root.resources = _resources([model, *track])

    def write(folder):
        tf.saved_model.save(root, folder, signatures=functions)
        if records:
            warming.write_records(records, folder)

    version_path = versions.publish(write, path, version)
    if server_files:
        files.write_missing(path)
    return version_path


def _resources(parts):
    """The lookup tables and other resources that parts of a model hold."""
    return [
        held
        for part in parts
        for held in tf.train.TrackableView(part).descendants()
        if isinstance(held, tf.saved_model.experimental.TrackableResource)
    ]
