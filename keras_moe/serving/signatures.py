"""Signatures: graphs with named inputs and outputs, and nothing that belongs to training."""

import inspect
import re
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_moe.serving.weights import ServingScope

# Operations that no server is to run, by the pattern of their names.
_UNWANTED = {
    "Random|Sampler|Multinomial": "draws random numbers: call the model without `training`",
    "Assign": "writes a variable: a server's answers must not depend on earlier requests",
    "PyFunc": "calls Python (tf.py_function, tf.numpy_function): a server has none",
}
# Names that Keras numbers through, so that they differ from process to process.
_NUMBERED = re.compile(r"(input_layer|keras_tensor)(_\d+)?")


class Signature(NamedTuple):
    """A traced signature.

    Attributes:
        function: Concrete function of positional tensors.
        inputs: Dict from the names of the inputs to `tf.TensorSpec`s, in the function's order.
    """

    function: Any
    inputs: dict

    def tensors(self, request):
        """The values of a request by name, as tensors; ValueError where one doesn't fit."""
        fits = request.keys() == self.inputs.keys()
        try:
            tensors = {k: tf.convert_to_tensor(request[k], s.dtype) for k, s in self.inputs.items()}
            fits = fits and all(s.is_compatible_with(tensors[k]) for k, s in self.inputs.items())
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise ValueError(
                "A request must have these inputs: "
                + ", ".join(f"{k} {s.dtype.name} {s.shape}" for k, s in self.inputs.items())
                + f". Received: {request!r}"
            )
        return tensors


def of_model(model):
    """The function and the input signature of a model's own call.

    Raises:
        ValueError: If the model was not built by symbolic inputs, so that it doesn't know them.
    """
    inputs = getattr(model, "inputs", None)
    if not inputs:
        raise ValueError(
            "The model doesn't tell its inputs, as one that is subclassed. Give them names, shapes "
            'and types, such as signatures={"serving_default": (model, [tf.TensorSpec([None], '
            f'"int32", "tokens")])}}. Received: {model.name!r}'
        )
    inputs = inputs[0] if isinstance(model, keras.Sequential) else model.input
    alone = len(tf.nest.flatten(inputs)) == 1

    def with_name(x):
        name = "inputs" if alone and _NUMBERED.fullmatch(x.name) else x.name
        # Of any number of rows, also where a model remembers that of its first batch.
        return tf.TensorSpec([None, *x.shape[1:]], x.dtype, name)

    return model, [tf.nest.map_structure(with_name, inputs)]


def trace(name, pair, weights):
    """Traces one signature.

    Args:
        name: Its name.
        pair: The function and its input signature, a list with a spec or a structure of specs for
            each argument.
        weights: `StoredWeights` of the layers that it calls.

    Returns:
        A `Signature`.

    Raises:
        ValueError: If the pair is none, an input or an output has no name of its own, an output
            is a scalar, or the graph has something in it that no server is to run.
    """
    function, specs = with_names(name, pair)
    # What a tf.function has traced before reads other variables than those to be stored.
    function = getattr(function, "python_function", function)

    @tf.function(input_signature=specs, autograph=False)
    def signature(*inputs):
        with ServingScope(weights):
            return by_name(function(*inputs))

    concrete = signature.get_concrete_function()
    for key, output in concrete.structured_outputs.items():
        if output.shape.rank == 0:
            raise ValueError(
                "An output must have an entry for each example, as servers put requests together "
                f"and take the answers apart. Received: signature {name!r} with the scalar {key!r}"
            )
    _check_graph(name, concrete.graph.as_graph_def())
    return Signature(concrete, {spec.name: spec for spec in tf.nest.flatten(specs)})


def with_names(name, pair):
    """A function and a list of its arguments' specs, each with a name; else ValueError."""
    try:
        function, specs = pair
        specs = list(specs)
    except (TypeError, ValueError):
        function = None
    if not callable(function):
        raise ValueError(
            "A signature must be a pair of a function and its input signature, such as "
            '(model, [tf.TensorSpec([None, None], "int32", "tokens")]). '
            f"Received: {name}={pair!r}"
        )
    arguments = inspect.signature(getattr(function, "call", function)).parameters
    for i, (spec, argument) in enumerate(zip(specs, arguments, strict=False)):
        if not tf.nest.is_nested(spec):
            specs[i] = _as_spec(spec, spec.name or argument)
    names = [spec.name for spec in tf.nest.flatten(specs)]
    if None in names or len(set(names)) < len(names):
        raise ValueError(
            "Every input must have a name of its own, such as "
            f'tf.TensorSpec([None], "string", "sentences"). Received: {name}={specs!r}'
        )
    return function, specs


def _as_spec(x, name):
    return tf.TensorSpec(x.shape, x.dtype, name)


def by_name(outputs):
    """Outputs as a dict from their names, as servers call them."""
    if isinstance(outputs, dict):
        return outputs
    flat = tf.nest.flatten(outputs)
    if len(flat) == 1:
        return {"outputs": flat[0]}
    return {f"outputs_{i}": output for i, output in enumerate(flat)}


def _check_graph(name, graph):
    functions = graph.library.function
    operations = {node.op for f in functions for node in f.node_def} | {n.op for n in graph.node}
    problems = [
        f"{problem} ({operation})"
        for operation in sorted(operations)
        for pattern, problem in _UNWANTED.items()
        if re.search(pattern, operation)
    ]
    if any(f.attr["_XlaMustCompile"].b for f in functions):
        problems.append("asks for XLA (jit_compile=True), which a server may lack")
    if problems:
        raise ValueError(f"The signature {name!r} {'; '.join(problems)}.")
