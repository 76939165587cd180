"""The clients of the examples: against servers that misbehave, and against a real one."""

import contextlib
import http.server
import json
import shutil
import socket
import subprocess
import threading
import time
from concurrent import futures

import grpc
import numpy as np
import pytest
import serve_client
import tensorflow as tf
from helpers import assign_random_weights, language_model
from serve_client import GrpcClient, RestClient, ServerError
from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

import keras_moe

ANSWER = {"words": [["war", "peace"]], "probabilities": [[0.75, 0.25]]}


class Behaviour:
    """What a server does with the requests that come in, one after the other."""

    def __init__(self, failures=0, delay=0.0):
        self.failures, self.delay = failures, delay
        self.requests = []

    def fails(self, request):
        self.requests.append(request)
        time.sleep(self.delay)
        return len(self.requests) <= self.failures


@contextlib.contextmanager
def rest_server(behaviour):
    """TensorFlow Serving's REST API, with one answer."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, answer = 200, {"outputs": ANSWER}
            if behaviour.fails((self.path, request)):
                status, answer = 503, {"error": "loading"}
            elif request["signature_name"] != "next_words":
                status, answer = 400, {"error": "no such signature"}
            with contextlib.suppress(ConnectionError):  # The client may have left.
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("localhost", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://localhost:{server.server_port}"
        server.shutdown()


@contextlib.contextmanager
def grpc_server(behaviour):
    """TensorFlow Serving's gRPC API, with one answer."""

    class Servicer(prediction_service_pb2_grpc.PredictionServiceServicer):
        def Predict(self, request, context):
            if behaviour.fails(request):
                context.abort(grpc.StatusCode.UNAVAILABLE, "loading")
            if request.model_spec.signature_name != "next_words":
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no such signature")
            response = predict_pb2.PredictResponse()
            for name, value in ANSWER.items():
                response.outputs[name].CopyFrom(tf.make_tensor_proto(value))
            return response

    server = grpc.server(futures.ThreadPoolExecutor(2))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(Servicer(), server)
    port = server.add_insecure_port("localhost:0")
    server.start()
    yield f"localhost:{port}"
    server.stop(None).wait()


WAYS = {"rest": (rest_server, RestClient), "grpc": (grpc_server, GrpcClient)}
both_ways = pytest.mark.parametrize(("serve", "client"), WAYS.values(), ids=WAYS.keys())


@both_ways
def test_clients_try_again_while_the_server_is_busy(serve, client):
    behaviour = Behaviour(failures=2)
    with serve(behaviour) as address:
        answer = client(address, "lm").predict("next_words", sentences=["the"])
    assert len(behaviour.requests) == 3
    assert tf.compat.as_text(answer["words"][0, 1]) == "peace"
    np.testing.assert_allclose(answer["probabilities"], [[0.75, 0.25]])


@both_ways
def test_clients_give_up_in_the_end(serve, client):
    behaviour = Behaviour(failures=100)
    with serve(behaviour) as address, pytest.raises(ServerError, match="loading"):
        client(address, "lm").predict("next_words", sentences=["the"])
    assert len(behaviour.requests) == 5


@both_ways
def test_clients_ask_a_wrong_question_once(serve, client):
    behaviour = Behaviour()
    with serve(behaviour) as address, pytest.raises(ServerError, match="no such signature"):
        client(address, "lm").predict("last_words", sentences=["the"])
    assert len(behaviour.requests) == 1


@both_ways
def test_clients_do_not_wait_for_ever(serve, client):
    behaviour = Behaviour(delay=1.0)
    with serve(behaviour) as address, pytest.raises(ServerError, match="(?i)timed out|deadline"):
        client(address, "lm", timeout=0.2).predict("next_words", sentences=["the"])
    assert len(behaviour.requests) == 1


@both_ways
def test_a_server_that_is_not_there_is_an_error(serve, client):
    with serve(Behaviour()) as address:
        pass
    with pytest.raises(ServerError):
        client(address, "lm").predict("next_words", sentences=["the"])


def test_what_the_rest_client_sends():
    behaviour = Behaviour()
    with rest_server(behaviour) as url:
        RestClient(url, "lm").predict("next_words", sentences=np.array(["the"]), k=np.int32(2))
    body = {"signature_name": "next_words", "inputs": {"sentences": ["the"], "k": 2}}
    assert behaviour.requests == [("/v1/models/lm:predict", body)]


@pytest.mark.parametrize("option", ["--rest", "--grpc"])
def test_the_command_line_prints_the_next_words(option, capsys):
    serve, _ = WAYS[option[2:]]
    with serve(Behaviour()) as address:
        serve_client.main([option, address, "the end of"])
    assert capsys.readouterr().out == "the end of … war 75.0%, peace 25.0%\n"
    with pytest.raises(SystemExit, match="error: "):
        serve_client.main([option, address, "the end of"])


def free_port():
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


def test_tensorflow_serving_answers_warms_up_and_changes_versions(tmp_path):
    program = shutil.which("tensorflow_model_server")
    if program is None:
        pytest.skip("tensorflow_model_server is not on the PATH: exports were not served by it")
    model, folder = language_model(), tmp_path / "lm"
    model.build((None, None))
    tokens = np.array([[1, 2, 3], [4, 0, 0]], "int32")

    def export(seed):
        assign_random_weights(model, np.random.default_rng(seed))
        signature = model, [tf.TensorSpec([None, None], "int32", "tokens")]
        keras_moe.export_saved_model(
            model,
            folder,
            signatures={"serving_default": signature},
            warm_up={"serving_default": {"tokens": [[1]]}},
        )
        return model.predict(tokens, verbose=0)

    def answers_become(expected, client, seconds=60):
        deadline = time.time() + seconds
        while True:
            try:
                answer = client.predict("serving_default", tokens=tokens)["outputs"]
                return np.testing.assert_allclose(answer, expected, rtol=1e-5, atol=1e-5)
            except (AssertionError, ServerError):
                if time.time() > deadline:
                    raise
                time.sleep(0.5)

    expected, ports = export(seed=0), [free_port(), free_port()]
    clients = [
        RestClient(f"http://localhost:{ports[0]}", "lm"),
        GrpcClient(f"localhost:{ports[1]}", "lm"),
    ]
    where = ("--model_name=lm", f"--model_base_path={folder}")
    command = [program, f"--rest_api_port={ports[0]}", f"--port={ports[1]}", *where]
    with open(tmp_path / "log", "w") as log, subprocess.Popen(command, stderr=log) as server:
        try:
            for client in clients:
                answers_become(expected, client)
                with pytest.raises(ServerError):
                    client.predict("serving_default", tokens=[[0.5]])
            expected = export(seed=1)
            for client in clients:
                answers_become(expected, client)
        finally:
            server.terminate()
    assert "warmup" in (tmp_path / "log").read_text().lower()
