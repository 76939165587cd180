"""What a GPU would run of a function, told by the graph and TensorFlow's registered kernels.

The wheel has the kernels for GPUs also where there is none. A function is traced in the way of GPUs
and runs once, here, so that TensorFlow inlines and optimizes its graph; each operation of that
then is on the GPU if there is a kernel for its dtypes. Where a tensor is on the GPU and its reader
wants it on the host, or the other way round, it would be copied.

Kernels and optimized graphs are not public (checked with TensorFlow 2.21).
"""

import functools
from typing import Any, NamedTuple

import tensorflow as tf
from tensorflow.python.eager import context
from tensorflow.python.framework import op_def_registry
from tensorflow.python.framework.kernels import get_registered_kernels_for_op

from keras_moe.backend.tensorflow import devices

# What hands tensors on, or reads what is known of them, and computes nothing.
_FREE = {
    "Const",
    "DeviceIndex",
    "ExpandDims",
    "Identity",
    "IdentityN",
    "Merge",
    "NoOp",
    "PreventGradient",
    "Rank",
    "ReadVariableOp",
    "Reshape",
    "Shape",
    "Size",
    "Squeeze",
    "StopGradient",
    "Switch",
    "VarHandleOp",
    "_Arg",
    "_Retval",
    "_SwitchN",
}


class Placement(NamedTuple):
    """What would be where.

    Attributes:
        missing: Dict from names to types of operations without a kernel for GPUs.
        on_host: Dict from names to types of operations that compute on the host.
        on_gpu: Dict from names to types of operations that compute on the GPU.
        from_gpu: Set of the tensors that are copied to the host.
        to_gpu: Set of the tensors that are copied to the GPU.
    """

    missing: Any
    on_host: Any
    on_gpu: Any
    from_gpu: Any
    to_gpu: Any


def placement(function, *arguments, way=1):
    """The `Placement` of what a function of tensors runs on a GPU; `way` 0 is that of CPUs."""
    with devices.choosing(way):
        specs = [tf.TensorSpec(x.shape, x.dtype) for x in arguments]
        traced = tf.function(function, autograph=False).get_concrete_function(*specs)
    return _place(_optimized(traced, arguments))


def _optimized(function, arguments):
    """The operations of the graph as they run."""
    context.enable_graph_collection()
    try:
        function(*arguments)
        graphs = context.context().export_run_metadata().function_graphs
    finally:
        context.disable_graph_collection()
    return max((list(graph.post_optimization_graph.node) for graph in graphs), key=len)


def _place(nodes):
    names = {node.name: node for node in nodes}
    found = Placement({}, {}, {}, set(), set())
    for node in nodes:
        if node.op.startswith("_") and node.op not in ("_SwitchN",):
            continue  # the function's arguments and results, and what CPUs alone fuse
        kernel = gpu_kernel(node)
        if kernel is None:
            found.missing[node.name] = node.op
        if node.op not in _FREE:
            outputs = [_on_host(node, i, "output_arg") for i in range(_number(node, "output_arg"))]
            where = found.on_host if kernel is None or (outputs and all(outputs)) else found.on_gpu
            where[node.name] = node.op
        data = [name for name in node.input if not name.startswith("^")]
        for i, tensor in enumerate(data):
            name, _, number = tensor.partition(":")
            source = names.get(name)
            if source is None or source.op.startswith("_") and source.op != "_SwitchN":
                continue
            here = _on_host(source, int(number or 0), "output_arg")
            there = _on_host(node, i, "input_arg")
            if here != there:
                (found.to_gpu if here else found.from_gpu).add(tensor)
    return found


def _on_host(node, number, arguments):
    kernel = gpu_kernel(node)
    return kernel is None or _arguments(node, arguments)[number] in kernel.host_memory_arg


def _number(node, arguments):
    return len(_arguments(node, arguments))


def _arguments(node, arguments):
    """The name of each input or output: several tensors may share one."""
    names = []
    for argument in getattr(op_def_registry.get(node.op), arguments):
        if argument.number_attr:
            number = node.attr[argument.number_attr].i
        elif argument.type_list_attr:
            number = len(node.attr[argument.type_list_attr].list.type)
        else:
            number = 1
        names += [argument.name] * number
    return names


def gpu_kernel(node):
    """The kernel that a GPU has for an operation with those dtypes, or `None`."""
    for device in ("GPU", "DEFAULT"):
        for kernel in _kernels(node.op):
            if kernel.device_type == device and all(_allows(c, node) for c in kernel.constraint):
                return kernel
    return None


@functools.cache
def _kernels(operation):
    return list(get_registered_kernels_for_op(operation).kernel)


def _allows(constraint, node):
    value, allowed = node.attr[constraint.name], constraint.allowed_values.list
    types = list(value.list.type) or [value.type]
    return (not allowed.type or all(t in allowed.type for t in types)) and (
        not allowed.s or value.s in allowed.s
    )
