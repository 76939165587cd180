"""Requests that a server answers before it lets a version take its place."""

import os

import tensorflow as tf

_FILE = os.path.join("assets.extra", "tf_serving_warmup_requests")
_MOST = 1000  # TensorFlow Serving refuses a version with more.


def make_records(requests, signatures):
    """Answers each request once, so that no server fails on one, and encodes them.

    Args:
        requests: Dict from names of signatures to a dict from names of inputs to values, or to a
            list of such dicts.
        signatures: Dict from names to `Signature`s.

    Returns:
        A list of bytes, a serialized `PredictionLog` for each request.

    Raises:
        ImportError: If tensorflow-serving-api, which defines them, is not installed.
        ValueError: If there is no such signature, or a request has other inputs than it, or there
            are more requests than a server takes.
    """
    try:
        from tensorflow_serving.apis import predict_pb2, prediction_log_pb2
    except ImportError as error:
        raise ImportError(
            "Warm-up requests take the package tensorflow-serving-api: "
            "`pip install keras_moe[serving]`. Or leave `warm_up` out."
        ) from error
    records = []
    for name, request in _one_by_one(requests):
        if name not in signatures:
            raise ValueError(
                "`warm_up` must have requests to signatures of the export: "
                f"{', '.join(sorted(signatures))}. Received: a request to {name!r}"
            )
        inputs = signatures[name].tensors(request)
        signatures[name].function(*inputs.values())
        proto = predict_pb2.PredictRequest()
        proto.model_spec.signature_name = name
        for key, value in inputs.items():
            proto.inputs[key].CopyFrom(tf.make_tensor_proto(value.numpy()))
        log = prediction_log_pb2.PredictionLog()
        log.predict_log.request.CopyFrom(proto)
        records.append(log.SerializeToString())
    if len(records) > _MOST:
        raise ValueError(
            f"A server takes at most {_MOST} warm-up requests. Received: {len(records)}"
        )
    return records


def write_records(records, folder):
    """Writes the file where TensorFlow Serving looks for it in the folder of a version."""
    path = os.path.join(folder, _FILE)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with tf.io.TFRecordWriter(path) as writer:
        for record in records:
            writer.write(record)


def _one_by_one(requests):
    for name, some in requests.items():
        for request in [some] if isinstance(some, dict) else some:
            yield name, request
