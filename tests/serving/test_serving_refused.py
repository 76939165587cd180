"""`export_saved_model`: what it refuses and why, and what it lets pass."""

import os

import keras
import numpy as np
import pytest
import tensorflow as tf
from exports import TOKENS, export
from helpers import WIDTH, examples

import keras_moe


def mean_loss(model):
    return lambda tokens: {"y": model(tokens), "mean": tf.reduce_mean(model(tokens))}


def counting(model):
    counter = tf.Variable(0.0)
    return lambda tokens: model(tokens) + counter.assign_add(1.0)


def in_python(model):
    return lambda tokens: tf.numpy_function(lambda y: y, [model(tokens)], tf.float32)


def compiled(model):
    one_hot = tf.function(lambda tokens: tf.one_hot(tokens, 3), jit_compile=True)
    return lambda tokens: one_hot(tokens)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda model: lambda tokens: model(tokens, training=True), "draws random numbers: call"),
        (mean_loss, "signature 'serving_default' with the scalar 'mean'"),
        (counting, "writes a variable.*Assign"),
        (in_python, "calls Python.*PyFunc"),
        (compiled, "asks for XLA"),
    ],
)
def test_what_no_server_should_run_is_refused(function, message, trained, tmp_path):
    model, _ = trained
    with pytest.raises(ValueError, match=message):
        keras_moe.export_saved_model(
            model, tmp_path, signatures={"serving_default": (function(model), [TOKENS])}
        )
    assert os.listdir(tmp_path) == []


class Subclassed(keras.Model):
    def call(self, x):
        return x


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"signatures": {"top": lambda tokens: tokens}}, "pair of a function and its input sig"),
        ({"signatures": {"top": (TOKENS, len)}}, "pair of a function and its input signature"),
        ({"signatures": {"top": (lambda a, b: a, [TOKENS, TOKENS])}}, "a name of its own"),
        ({"signatures": {"top": (lambda a: a, [[tf.TensorSpec([None])]])}}, "a name of its own"),
        ({"dtype": "float16"}, "`dtype` must be \"bfloat16\" or `None`. Received: 'float16'"),
        ({"model": Subclassed()}, "Call or build 'subclassed.*' first"),
        ({"warm_up": {"bottom": {}}}, "signatures of the export: serving_default.*'bottom'"),
        ({"warm_up": {"serving_default": {"x": [[1.0]]}}}, "inputs: x float32 .None, 6.. Receiv"),
        ({"warm_up": {"serving_default": {"y": 1}}}, "must have these inputs: x float32"),
        ({"warm_up": {"serving_default": {"x": "a"}}}, "must have these inputs: x float32"),
        ({"warm_up": {"serving_default": [{"x": [[0.0] * 6]}] * 1001}}, "at most 1000.*1001"),
    ],
)
def test_wrong_arguments_are_explained(arguments, message, tmp_path):
    model = keras.Sequential([keras.Input((WIDTH,), name="x"), keras.layers.Dense(1)])
    with pytest.raises(ValueError, match=message):
        keras_moe.export_saved_model(**{"model": model, "path": tmp_path, **arguments})
    assert os.listdir(tmp_path) == []


def test_a_model_may_hold_layers_that_it_does_not_call(tmp_path):
    class Spare(Subclassed):
        def build(self, shape):
            self.spare = [keras.layers.Embedding(3, 2), keras_moe.SparseMoE(3, 2, k=1)]

    model = Spare()
    model(examples(2))
    signatures = {"serving_default": (model, [tf.TensorSpec([None, WIDTH])])}
    answer, _ = export(model, tmp_path, name="x", signatures=signatures)
    np.testing.assert_array_equal(answer(examples(3)), examples(3))


def test_a_subclassed_model_has_to_name_its_inputs(tmp_path):
    model = Subclassed()
    model(examples(2))
    with pytest.raises(ValueError, match="doesn't tell its inputs.*tf.TensorSpec"):
        keras_moe.export_saved_model(model, tmp_path)
