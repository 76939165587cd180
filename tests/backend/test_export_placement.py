"""What a GPU would run of an export made where there is none, told by its graph."""

import keras
import pytest
from helpers import EVERY_LAYER, WIDTH
from placement import gpu_kernel
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow.python.framework import op_def_registry

from keras_moe import SparseMoE, export_saved_model

pytestmark = pytest.mark.cpu


CPU, GPU = 1, 0  # the branches of a choice by the device


def run_by(device, folder):
    """The operations that a device may run of `serving_default`, as nodes with all attributes.

    Where the device chooses, one branch counts; of all other branches and loops every one does.
    """
    (graph,) = saved_model_pb2.SavedModel.FromString(
        (folder / "saved_model.pb").read_bytes()
    ).meta_graphs
    functions = {f.signature.name: f.node_def for f in graph.graph_def.library.function}
    (output,) = graph.signature_def["serving_default"].outputs.values()
    (root,) = [n for n in graph.graph_def.node if n.name == output.name.split(":")[0]]
    found, waiting, seen = [], called_by(root), set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        operations = {node.name: node.op for node in functions[name]}
        for node in functions[name]:
            found.append(with_defaults(node))
            waiting += called_by(node, device if chooses(node, operations) else None)
    return found


def called_by(node, branch=None):
    """The names of the functions that an operation may call, or of one branch."""
    names = [value.func.name for value in node.attr.values() if value.HasField("func")]
    names += [function.name for value in node.attr.values() for function in value.list.func]
    return names if branch is None else [names[branch]]


def chooses(node, operations):
    """Whether it is a choice by the device: in a function an input is `operation:output:number`."""
    by = node.input[0].split(":")[0] if node.input else None
    return node.op in ("Case", "StatelessCase") and operations.get(by) == "DeviceIndex"


def with_defaults(node):
    """An export leaves out what is as the operation has it anyway."""
    for attribute in op_def_registry.get(node.op).attr:
        if attribute.name not in node.attr and attribute.HasField("default_value"):
            node.attr[attribute.name].CopyFrom(attribute.default_value)
    return node


def layer_experts():
    expert = keras.Sequential([keras.layers.Dense(4, "gelu"), keras.layers.Dense(WIDTH)])
    return SparseMoE(5, experts=expert, k=2)


LAYERS = {
    name: EVERY_LAYER[name] for name in ("noisy_top_k", "strictly_balanced", "hierarchical")
} | {"layer_experts": layer_experts}


@pytest.fixture(scope="module", params=LAYERS)
def exported(request, tmp_path_factory):
    model = keras.Sequential([keras.Input((WIDTH,), name="x"), LAYERS[request.param]()])
    return request.param, export_saved_model(model, tmp_path_factory.mktemp(request.param))


def test_a_gpu_has_kernels_for_its_way_and_no_loop(exported):
    _, folder = exported
    of_gpu = run_by(GPU, folder)
    operations = {node.op for node in of_gpu}
    assert operations & {"MatMul", "BatchMatMulV2"}
    assert {node.op for node in of_gpu if gpu_kernel(node) is None} == set()
    assert {operation for operation in operations if "While" in operation} == set()


def test_a_cpu_has_its_own_way(exported):
    name, folder = exported
    operations = {node.op for node in run_by(CPU, folder)}
    if name == "noisy_top_k":  # A loop over experts; a plain product for a single row.
        assert operations >= {"StatelessWhile", "SparseMatMul"}
    if name == "strictly_balanced":
        assert "StatelessWhile" in operations
