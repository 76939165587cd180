"""A TPU that is not there: its strategy, and what one of its chips would run.

`TPUStrategy` asks for the names of TPU cores, and TensorFlow puts on the host what it finds no
device for. So a host without TPUs traces the function of a replica, as it will run there. It can't
compile it: the package has no kernels for TPUs, and none at all for the two collectives. Therefore

- the function of one chip is traced without `tpu.replicate`, so that it can be lowered by the
  kernels that TensorFlow has for XLA on any device;
- `AllToAll` and `CrossReplicaSum` are replaced by other operations of TensorFlow that become the
  same instructions of XLA, all-to-all and all-reduce.

Checked with TensorFlow 2.21 and jax 0.10.2, of which much of this is not public.
"""

import contextlib
from types import SimpleNamespace
from unittest import mock

import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops
from tensorflow.python.distribute.tpu_strategy import _TPUReplicaContext
from tensorflow.python.ops import gen_tpu_ops
from tensorflow.python.tpu.tpu_function import tpu_shard_context
from tensorflow.python.tpu.tpu_replication import TPUReplicateContext

_ALL_TO_ALL = """
func.func public @main(%x: {type}) -> {type} {{
  %y = "stablehlo.all_to_all"(%x) <{{
    split_dimension = {split_dimension} : i64, concat_dimension = {concat_dimension} : i64,
    split_count = {split_count} : i64, replica_groups = dense<{groups}> : tensor<{shape}xi64>
  }}> : ({type}) -> {type}
  return %y : {type}
}}"""


def make_strategy(num_replicas, packed=False):
    """A `TPUStrategy` without TPUs.

    Args:
        num_replicas: R.
        packed: Whether functions capture one handle for the parts of a variable, as `TPUStrategy`
            has it. Assignments then find a part by its device, and here all are on the same.
    """
    name = "/job:localhost/replica:0/task:0/device:TPU:{}"
    metadata = tf.tpu.experimental.TPUSystemMetadata(
        num_cores=num_replicas,
        num_hosts=1,
        num_of_cores_per_host=num_replicas,
        topology=None,
        devices=[SimpleNamespace(name=name.format(i)) for i in range(num_replicas)],
    )
    strategy = tf.distribute.TPUStrategy(
        SimpleNamespace(get_tpu_system_metadata=lambda: metadata, cluster_spec=lambda: None)
    )
    strategy._enable_packed_variable_in_eager_mode = packed
    return strategy


def of_one_chip(strategy, function):
    """What one chip runs of the function of a replica, as a `tf.function`.

    It is there to be lowered: of variables it captures those of the first replica.
    """

    @tf.function(jit_compile=True, autograph=False)
    def run(*arguments):
        replica = tf.cast(gen_xla_ops.xla_replica_id(), tf.int32)
        chip = _OneChip("one_chip", strategy.num_replicas_in_sync, tf.no_op())
        chip.Enter()
        try:
            with (
                tpu_shard_context(strategy.num_replicas_in_sync),
                _TPUReplicaContext(strategy, replica_id_in_sync_group=replica),
                _collectives_for_any_device(),
            ):
                return function(*arguments)
        finally:
            chip.Exit()

    return run


def lower(function, *specs):
    """A function of `of_one_chip` and a `tf.TensorSpec` of each argument to a module of XLA, bytes.

    Its arguments are those of the function, then the variables that it captures. Its results are
    those of the function, then the variables that it has updated.
    """
    return function.experimental_get_compiler_ir(*specs)(stage="hlo_serialized")


class _OneChip(TPUReplicateContext):
    """Says that a TPU's function is traced, and does nothing else to it."""

    def AddOp(self, op):
        pass

    def AddValue(self, value):
        return value

    def get_replicated_var_handle(self, name, handle_id, vars_, is_mirrored=False, is_packed=False):
        return vars_[0].handle


@contextlib.contextmanager
def _collectives_for_any_device():
    def all_to_all(input, group_assignment, split_count, **dimensions):
        x, groups = tf.convert_to_tensor(input), tf.convert_to_tensor(group_assignment)
        dimensions.pop("name", None)
        sizes = ["?" if size is None else str(size) for size in x.shape]
        kind = "bf" if x.dtype == tf.bfloat16 else "f" if x.dtype.is_floating else "i"
        module = _ALL_TO_ALL.format(
            type=f"tensor<{'x'.join([*sizes, f'{kind}{8 * x.dtype.size}'])}>",
            groups=tf.get_static_value(groups).tolist(),
            shape="x".join(map(str, groups.shape)),
            split_count=split_count,
            **dimensions,
        )
        (y,) = gen_xla_ops.xla_call_module(
            # The last version that takes sizes which only XLA finds out.
            [x],
            version=5,
            module=module,
            Sout=[x.shape],
            Tout=[x.dtype],
            platforms=["CPU"],
        )
        return y

    def cross_replica_sum(input, group_assignment, name=None):
        return gen_xla_ops.xla_all_reduce(
            input, group_assignment, reduce_op="Add", mode="CrossReplica"
        )

    with (
        mock.patch.object(tf.raw_ops, "AllToAll", all_to_all),
        mock.patch.object(tf.raw_ops, "CrossReplicaSum", cross_replica_sum),
        # For what TPUStrategy and Keras do by themselves.
        mock.patch.object(gen_tpu_ops, "all_to_all", all_to_all),
        mock.patch.object(gen_tpu_ops, "cross_replica_sum", cross_replica_sum),
    ):
        yield


@contextlib.contextmanager
def reading(module):
    """What `lower` returns as a module of MLIR, which lasts as long as the context."""
    from jax._src.interpreters import mlir
    from jaxlib import _jax
    from jaxlib.mlir import ir

    copies = []

    def visit(operation):
        if operation.name == "mhlo.copy":
            copies.append(operation)
        return ir.WalkResult.ADVANCE

    with mlir.make_ir_context():
        module = ir.Module.parse(_jax.mlir.hlo_to_stablehlo(module))
        module.operation.walk(visit)
        for copy in copies:  # TensorFlow's, of updated variables. StableHLO has no such operation.
            copy.results[0].replace_all_uses_with(copy.operands[0])
            copy.erase()
        yield module


def options_for(devices):
    """The options by which jax compiles a module for devices, each a replica, and their list."""
    import numpy as np
    from jax._src import compiler
    from jaxlib import _jax

    options = compiler.get_compile_options(
        num_replicas=len(devices),
        num_partitions=1,
        device_assignment=np.arange(len(devices))[:, None],
    )
    return _jax.DeviceList(tuple(devices)), options
