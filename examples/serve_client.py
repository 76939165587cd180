"""Asks a model server for the next words of sentences, by REST or by gRPC.

    python examples/serve_client.py "we must protect the" "the senate"
    python examples/serve_client.py --grpc localhost:8500 "we must protect the"

saved_models/README.md tells how to start the server. Where it can't be reached or is busy, both
clients try again, since a question does no harm when it is asked twice. An answer that takes too
long is an error.
"""

import argparse
import json
import sys

import grpc
import numpy as np
import requests
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc
from urllib3.util import Retry

ATTEMPTS = 5  # the most that gRPC allows


class ServerError(Exception):
    """What went wrong on the server, or on the way to it."""


class RestClient:
    """Asks over HTTP, in JSON.

    Args:
        url: As `http://localhost:8501`.
        model: The model's name on the server.
        timeout: Seconds to wait for an answer, each time.
    """

    def __init__(self, url, model, timeout=5.0):
        self.url = f"{url}/v1/models/{model}:predict"
        self.timeout = timeout
        again = Retry(
            ATTEMPTS - 1,
            read=0,  # After a time-out the server may be at work on it still.
            backoff_factor=0.1,
            status_forcelist=[429, 502, 503, 504],
            allowed_methods=None,
            raise_on_status=False,
        )
        self.session = requests.Session()
        self.session.mount(url, requests.adapters.HTTPAdapter(max_retries=again))

    def predict(self, signature, **inputs):
        """Asks a signature.

        Args:
            signature: Its name.
            **inputs: Arrays or lists by name, strings as str.

        Returns:
            Dict from the names of the outputs to arrays; an output that is the only one is called
            `outputs`, since the server doesn't say its name.

        Raises:
            ServerError: If there is no answer, or none in time.
        """
        inputs = {name: np.asarray(value).tolist() for name, value in inputs.items()}
        body = {"signature_name": signature, "inputs": inputs}
        try:
            response = self.session.post(self.url, json=body, timeout=self.timeout)
            answer = response.json()
        except requests.RequestException as error:
            raise ServerError(str(error)) from error
        if "outputs" not in answer:
            raise ServerError(answer.get("error", f"status {response.status_code}"))
        outputs = answer["outputs"]
        outputs = outputs if isinstance(outputs, dict) else {"outputs": outputs}
        return {name: np.array(value) for name, value in outputs.items()}


class GrpcClient:
    """Asks over gRPC, in protocol buffers: faster for large arrays.

    Args:
        address: As `localhost:8500`.
        model: The model's name on the server.
        timeout: Seconds to wait for an answer, all attempts together.
    """

    def __init__(self, address, model, timeout=5.0):
        self.model = model
        self.timeout = timeout
        retry = {
            "maxAttempts": ATTEMPTS,
            "initialBackoff": "0.1s",
            "maxBackoff": "2s",
            "backoffMultiplier": 2,
            "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
        }
        service = {"service": "tensorflow.serving.PredictionService"}
        config = {"methodConfig": [{"name": [service], "retryPolicy": retry}]}
        options = [
            ("grpc.service_config", json.dumps(config)),
            ("grpc.max_receive_message_length", -1),  # instead of 4 MB
        ]
        channel = grpc.insecure_channel(address, options)
        self.stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)

    def predict(self, signature, **inputs):
        """Asks a signature.

        Args:
            signature: Its name.
            **inputs: Arrays or lists by name, in the signature's dtypes, strings as str or bytes.

        Returns:
            Dict from the names of the outputs to arrays, strings as bytes.

        Raises:
            ServerError: If there is no answer, or none in time.
        """
        request = predict_pb2.PredictRequest()
        request.model_spec.name = self.model
        request.model_spec.signature_name = signature
        for name, value in inputs.items():
            request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
        try:
            response = self.stub.Predict(request, timeout=self.timeout)
        except grpc.RpcError as error:
            raise ServerError(f"{error.code().name}: {error.details()}") from error
        return {name: tf.make_ndarray(value) for name, value in response.outputs.items()}


def main(arguments=None):
    """Prints the likeliest next words of the sentences on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--rest", default="http://localhost:8501", metavar="URL", help="%(default)s")
    where.add_argument("--grpc", metavar="HOST:PORT", help="ask by gRPC instead")
    parser.add_argument("--model", default="language_model", help="name on the server")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds for an answer")
    parser.add_argument("sentences", nargs="+", help="beginnings of sentences")
    args = parser.parse_args(arguments)
    if args.grpc:
        client = GrpcClient(args.grpc, args.model, args.timeout)
    else:
        client = RestClient(args.rest, args.model, args.timeout)
    try:
        answer = client.predict("next_words", sentences=args.sentences)
    except ServerError as error:
        sys.exit(f"error: {error}")
    for sentence, words, chances in zip(
        args.sentences, answer["words"], answer["probabilities"], strict=True
    ):
        guesses = (
            f"{tf.compat.as_text(word)} {chance:.1%}"
            for word, chance in zip(words, chances, strict=True)
        )
        print(f"{sentence} … {', '.join(guesses)}")


if __name__ == "__main__":
    main()
