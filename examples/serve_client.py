"""Asks a model server for the next words of sentences, by REST or by gRPC.

    python examples/serve_client.py "we must protect the" "the senate"
    python examples/serve_client.py --grpc localhost:8500 "we must protect the"

saved_models/README.md tells how to start the server. Where it can't be reached or is busy, both
clients try again until their time is up, since a question does no harm when it is asked twice. They
wait for longer each time, and not for equally long: else all callers that a busy server has sent
away would be back at the same moment.
"""

import argparse
import itertools
import random
import sys
import time

import grpc
import numpy as np
import requests
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 2.0  # seconds
BUSY_STATUS = {429, 502, 503, 504}
BUSY_CODES = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED}


class ServerError(Exception):
    """What went wrong on the server, or on the way to it."""


class BusyError(ServerError):
    """The server has not begun with the question, and may answer it later."""


def ask_until(deadline, ask):
    """Asks until there is an answer or no time left.

    Args:
        deadline: By `time.monotonic`.
        ask: Function of the seconds left; raises `BusyError` where it may be called again.

    Returns:
        What `ask` returns.

    Raises:
        ServerError: If there is no answer, or none in time.
    """
    for attempt in itertools.count():
        try:
            return ask(max(deadline - time.monotonic(), 1e-3))
        except BusyError as error:
            # Any time up to twice the last one, so that callers spread ("full jitter").
            pause = random.uniform(0, min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE))
            if time.monotonic() + pause >= deadline:
                raise ServerError(f"no answer in time, {attempt + 1} attempts: {error}") from error
            time.sleep(pause)


class RestClient:
    """Asks over HTTP, in JSON.

    Args:
        url: As `http://localhost:8501`.
        model: The model's name on the server.
        timeout: Seconds to wait for an answer, all attempts together.
        connections: The most callers of this client at the same time that keep their connections.
    """

    def __init__(self, url, model, timeout=5.0, connections=64):
        self.url = f"{url}/v1/models/{model}:predict"
        self.timeout = timeout
        self.session = requests.Session()
        self.session.mount(url, requests.adapters.HTTPAdapter(pool_maxsize=connections))

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
        outputs = ask_until(time.monotonic() + self.timeout, lambda left: self._post(body, left))
        outputs = outputs if isinstance(outputs, dict) else {"outputs": outputs}
        return {name: np.array(value) for name, value in outputs.items()}

    def _post(self, body, seconds):
        try:
            response = self.session.post(self.url, json=body, timeout=seconds)
        except requests.ConnectTimeout as error:
            raise ServerError(str(error)) from error
        except requests.ConnectionError as error:
            raise BusyError(str(error)) from error
        except requests.RequestException as error:  # The server may be at work on it still.
            raise ServerError(str(error)) from error
        try:
            answer = response.json()
        except requests.JSONDecodeError:  # of a proxy before the server
            answer = {}
        if "outputs" in answer:
            return answer["outputs"]
        kind = BusyError if response.status_code in BUSY_STATUS else ServerError
        raise kind(answer.get("error", f"status {response.status_code}"))


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
        options = [
            ("grpc.enable_retries", 0),  # at most five times, with which a busy server isn't done
            ("grpc.initial_reconnect_backoff_ms", 100),  # instead of a second
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
        outputs = ask_until(time.monotonic() + self.timeout, lambda left: self._call(request, left))
        return {name: tf.make_ndarray(value) for name, value in outputs.items()}

    def _call(self, request, seconds):
        try:
            return self.stub.Predict(request, timeout=seconds).outputs
        except grpc.RpcError as error:
            too_large = "larger than max" in error.details()  # has the code of a busy server
            kind = BusyError if error.code() in BUSY_CODES and not too_large else ServerError
            raise kind(f"{error.code().name}: {error.details()}") from error


def main(arguments=None):
    """Prints the likeliest next words of the sentences on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--rest", default="http://localhost:8501", metavar="URL", help="%(default)s")
    where.add_argument("--grpc", metavar="HOST:PORT", help="ask by gRPC instead")
    parser.add_argument("--model", default="language_model", help="name on the server")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds, all attempts together")
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
