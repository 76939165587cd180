"""The clients of the examples: against servers that misbehave, and against a real one."""

import contextlib
import functools
import http.server
import json
import os
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
from keras_moe.serving import token_signature

ANSWER = {"words": [["war", "peace"]], "probabilities": [[0.75, 0.25]]}


class Behaviour:
    """What a server does with the requests that come in, one after the other."""

    def __init__(self, failures=0, delay=0.0, at_once=100):
        self.failures, self.delay = failures, delay
        self.free = threading.Semaphore(at_once)
        self.requests = []

    def fails(self, request):
        """Whether it is too busy; otherwise it takes its time."""
        self.requests.append(request)
        if not self.free.acquire(blocking=False):
            return True
        time.sleep(self.delay)
        self.free.release()
        return len(self.requests) <= self.failures


@contextlib.contextmanager
def rest_server(behaviour):
    """TensorFlow Serving's REST API, with one answer."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, answer = 200, {"outputs": ANSWER}
            if behaviour.fails((self.path, request)):
                status, answer = 429, {"error": "loading"}
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
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "loading")
            if request.model_spec.signature_name != "next_words":
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no such signature")
            response = predict_pb2.PredictResponse()
            for name, value in ANSWER.items():
                response.outputs[name].CopyFrom(tf.make_tensor_proto(value))
            return response

    server = grpc.server(futures.ThreadPoolExecutor(16))
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
def test_clients_give_up_when_their_time_is_up(serve, client):
    behaviour, start = Behaviour(failures=10**6), time.monotonic()
    with (
        serve(behaviour) as address,
        pytest.raises(ServerError, match="no answer in time.*loading"),
    ):
        client(address, "lm", timeout=1.0).predict("next_words", sentences=["the"])
    assert time.monotonic() - start < 5
    assert len(behaviour.requests) >= 2


def test_pauses_grow_differ_and_end_at_the_deadline(monkeypatch):
    now, pauses, left = [0.0], [], []
    monkeypatch.setattr(serve_client.time, "monotonic", lambda: now[0])

    def sleep(seconds):
        pauses.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(serve_client.time, "sleep", sleep)

    def ask(seconds):
        left.append(seconds)
        raise serve_client.BusyError("busy")

    runs = []
    for _ in range(2):
        now[0], pauses, left = 0.0, [], []
        with pytest.raises(ServerError, match="attempts: busy"):
            serve_client.ask_until(30.0, ask)
        runs.append(pauses)
        assert left == [30.0, *(30.0 - np.cumsum(pauses))]
        # 0.1 · 2^n, at most 2 seconds: 1.6 of the fifth, 2 of all later ones.
        most = [min(0.1 * 2**n, 2.0) for n in range(len(pauses))]
        assert all(0 <= pause <= m for pause, m in zip(pauses, most, strict=True))
        assert 28 <= sum(pauses) < 30
    assert runs[0] != runs[1]


@both_ways
def test_many_callers_of_a_busy_server_all_get_an_answer(serve, client):
    behaviour = Behaviour(delay=0.02, at_once=2)
    with serve(behaviour) as address, futures.ThreadPoolExecutor(32) as callers:
        shared = client(address, "lm", timeout=60.0)
        answers = callers.map(lambda word: shared.predict("next_words", sentences=[word]), "a" * 32)
        for answer in answers:
            np.testing.assert_allclose(answer["probabilities"], [[0.75, 0.25]])
    assert len(behaviour.requests) > 32  # Some have been sent away.


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
    with pytest.raises(ServerError, match="no answer in time"):
        client(address, "lm", timeout=0.5).predict("next_words", sentences=["the"])


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
        serve_client.main([option, address, "--timeout", "0.5", "the end of"])


def free_port():
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


@pytest.fixture
def model_server():
    program = shutil.which("tensorflow_model_server")
    if program is None:
        pytest.skip("tensorflow_model_server is not on the PATH: exports were not served by it")
    return program


@contextlib.contextmanager
def tensorflow_serving(program, folder, log, *options):
    """The real server: its REST client and its gRPC client."""
    ports = [free_port(), free_port()]
    command = [program, f"--rest_api_port={ports[0]}", f"--port={ports[1]}", *options]
    command += ["--model_name=lm", f"--model_base_path={folder}"]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "0"}  # Its log tells of the warm-up.
    clients = [
        RestClient(f"http://localhost:{ports[0]}", "lm"),
        GrpcClient(f"localhost:{ports[1]}", "lm"),
    ]
    with (
        open(log, "w") as stderr,
        subprocess.Popen(command, stderr=stderr, env=environment) as server,
    ):
        try:
            yield clients
        finally:
            server.terminate()


def word_model():
    model = language_model()
    model.build((None, None))
    assign_random_weights(model, np.random.default_rng(0))
    return model


def answers_become(expected, client, seconds=60, **request):
    deadline = time.time() + seconds
    while True:
        try:
            answer = client.predict("serving_default", **request)["outputs"]
            return np.testing.assert_allclose(answer, expected, rtol=1e-5, atol=1e-5)
        except (AssertionError, ServerError):
            if time.time() > deadline:
                raise
            time.sleep(0.5)


def test_tensorflow_serving_answers_warms_up_and_changes_versions(model_server, tmp_path):
    model, folder = word_model(), tmp_path / "lm"
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

    expected = export(seed=0)
    with tensorflow_serving(model_server, folder, tmp_path / "log") as clients:
        for client in clients:
            answers_become(expected, client, tokens=tokens)
            with pytest.raises(ServerError):
                client.predict("serving_default", tokens=[[0.5]])
        expected = export(seed=1)
        for client in clients:
            answers_become(expected, client, tokens=tokens)
    assert "warmup" in (tmp_path / "log").read_text().lower()


def test_tensorflow_serving_puts_requests_together(model_server, tmp_path):
    """By the files beside an export: callers at once, of different lengths, one of them hostile."""
    model, folder = word_model(), tmp_path / "lm"
    tokens = tf.TensorSpec([None, None], "int32", "tokens")
    signatures = {"serving_default": token_signature(model, [tokens])}
    keras_moe.export_saved_model(model, folder, signatures=signatures, server_files=True)
    options = [
        "--enable_batching",
        f"--batching_parameters_file={folder / 'batching_parameters.txt'}",
        f"--monitoring_config_file={folder / 'monitoring_config.txt'}",
    ]
    rows = [np.random.default_rng(i).integers(1, 50, (1, 1 + i % 7), "int32") for i in range(32)]
    rows[5] = np.full((1, 3), 50, "int32")  # one more than there are

    def ask(client, row):
        lengths = np.array([row.shape[1]], "int32")
        return client.predict("serving_default", tokens=row, lengths=lengths)

    with tensorflow_serving(model_server, folder, tmp_path / "log", *options) as clients:
        for client in clients:
            first = {"tokens": rows[0], "lengths": np.ones(1, "int32")}
            answers_become(model(rows[0]), client, **first)
            with futures.ThreadPoolExecutor(32) as callers:
                answers = callers.map(functools.partial(ask, client), rows)
                for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
                    outputs = answer["outputs"][:, : row.shape[1]].astype("float32")
                    if i == 5:
                        assert np.all(np.isnan(outputs))
                    else:
                        np.testing.assert_allclose(outputs, model(row), rtol=1e-5, atol=1e-5)
