"""What expert parallelism needs of TensorFlow that is not public, all of it in this one file.

Checked with TensorFlow 2.19 to 2.21. `tf.distribute` has no public variable that is held in shards,
no all-to-all, and no collective that a replica may launch without waiting in `merge_call` for the
others: that would let them run into the same Keras layer meanwhile. But a strategy has launchers
of collectives, one for each replica, and its own variables are built of one component for each.

A strategy over several workers, `MultiWorkerMirroredStrategy`, runs in one process for each. There
a process has the launchers and the components of its own replicas alone, which are numbered from 0
in each, while collectives are of all replicas of all workers.

`TPUStrategy` traces one function for all replicas. In it the handle of a variable stands for that
of whichever replica runs it, the number of the replica is a tensor, and collectives are operations
of the public `tf.raw_ops`.

A SavedModel has all rows in one variable. To write it TensorFlow traces functions anew, and asks
each variable by a private method for what is to stand in its place.

Checked with Keras 3.10 to 3.15. It has no public way to tell an optimizer that a gradient needs no
sum over the replicas. So `ExpertParallel` does by itself what Keras does before and after
`update_step`, and needs the slots for it.
"""

import functools
import weakref

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.distribute.tpu_util import enclosing_tpu_context
from tensorflow.python.distribute.values import DistributedVariable
from tensorflow.python.distribute.values_util import get_current_replica_id_as_int
from tensorflow.python.ops import collective_ops
from tensorflow.python.ops.resource_variable_ops import (
    BaseResourceVariable,
    ResourceVariable,
    UninitializedVariable,
    copy_to_graph_uninitialized,
)


class VariableOfShards(DistributedVariable):
    """What TensorFlow asks of a distributed variable by private names, here by public ones.

    Args:
        strategy: The strategy.
        shards: List of variables, one for each replica of this process.
    """

    def __init__(self, strategy, shards):
        super().__init__(strategy, shards, tf.VariableAggregation.NONE)

    @property
    def shards(self):
        """List of the variables of this process's replicas."""
        return list(self._values)

    @property
    def shard(self):
        """This replica's variable; `None` outside of the replicas of its strategy."""
        if tf.distribute.get_strategy() is not self.distribute_strategy:
            return None
        if on_tpu():
            return component_on_tpu(self)
        replica = local_replica()
        return None if replica is None else self._values[replica]

    def current(self):
        """What is read here: inside a replica its variable, elsewhere a tensor of all."""
        raise NotImplementedError

    @functools.cached_property
    def in_saved_model(self):
        """The one variable, of all rows, that a SavedModel has in the place of this one.

        It takes no memory: the values go from the shards into the files.
        """
        with tf.init_scope(), tf.device("CPU:0"):
            return UninitializedVariable(shape=self.shape, dtype=self.dtype, name=self.name)

    def _get(self):
        return self.current()

    def _get_cross_replica(self):
        return self.current()

    def _get_on_device_or_primary(self):
        return self.shard or self._primary

    def _get_replica(self, replica_id):
        return self.values  # Where replicas update without `merge_call`.

    def _dense_var_to_tensor(self, dtype=None, name=None, as_ref=False):
        return tf.convert_to_tensor(self.current(), dtype=dtype, name=name)

    def _export_to_saved_model_graph(self, object_map, tensor_map, options=None, **kwargs):
        handle = self.in_saved_model.handle
        object_map[self] = variable = copy_to_graph_uninitialized(self.in_saved_model)
        tensor_map[handle] = variable.handle
        return [handle]


def local_replica():
    """The number of the current replica, or of the one that is being updated; `None` outside."""
    return get_current_replica_id_as_int()


def on_tpu():
    """Whether what is traced is the function of all replicas of a `TPUStrategy`."""
    return enclosing_tpu_context() is not None


def component_on_tpu(variable):
    """What a replica of a `TPUStrategy` holds of a distributed variable, as a variable."""
    first = variable._values[0]
    component = BaseResourceVariable(
        handle=variable.handle,
        shape=first.shape,
        dtype=first.dtype,
        trainable=first.trainable,
        handle_name=first.name,
    )
    component._distributed_container = weakref.ref(variable)  # By which Keras finds its slots.
    return component


def handle_on_tpu(variable):
    """The handle of what a replica of a `TPUStrategy` holds of a variable, not the same on all."""
    packed = variable._packed_var
    return enclosing_tpu_context().get_replicated_var_handle(
        variable._common_name,
        f"{variable._common_name}_{id(variable._primary)}",  # Names alone need not differ.
        variable._values if packed is None else [packed],
        is_packed=packed is not None,
    )


def make_component(**kwargs):
    """Makes a variable on the current device that no strategy makes into another."""
    return ResourceVariable(**kwargs)


def has_collectives(strategy):
    """Whether the replicas of a strategy can launch collectives."""
    return on_tpu() or bool(_launchers(strategy))


def all_to_all(x):
    """Sends x[r] to replica r and returns what all have sent, [R, ...], without a gradient."""
    strategy = tf.distribute.get_strategy()
    if on_tpu():
        return tf.raw_ops.AllToAll(
            input=x,
            group_assignment=_everybody(),
            concat_dimension=0,
            split_dimension=0,
            split_count=strategy.num_replicas_in_sync,
        )
    launcher = _launchers(strategy)[local_replica()]
    ranks = _ranks(strategy)
    if ranks == sorted(ranks):
        return _launch(launcher, collective_ops.all_to_all_v2, x)
    by_rank = _launch(launcher, collective_ops.all_to_all_v2, tf.gather(x, np.argsort(ranks)))
    return tf.gather(by_rank, ranks)


def all_reduce(x, merge_op):
    """The sum ("Add") or the maximum ("Max") over all replicas, without a gradient."""
    if on_tpu():
        if merge_op == "Add":
            return tf.raw_ops.CrossReplicaSum(input=x, group_assignment=_everybody())
        num_replicas = tf.distribute.get_strategy().num_replicas_in_sync
        # There is no operation for it, and what is asked for is a number or two.
        return tf.reduce_max(all_to_all(tf.repeat(x[None], num_replicas, axis=0)), axis=0)
    launcher = _launchers(tf.distribute.get_strategy())[local_replica()]
    return _launch(launcher, collective_ops.all_reduce_v2, x, merge_op=merge_op)


def gather_from_workers(strategy, rows):
    """The rows of all workers on each one's host, in the order of their replicas.

    Args:
        strategy: A strategy over several workers, all of which call this, outside of replicas.
        rows: This worker's, a tensor [n, ...], n the same for all.
    """
    (launcher,) = strategy.extended._host_cross_device_ops._launchers
    gathered = _launch(launcher, collective_ops.all_gather_v2, rows)
    ranks = _worker_ranks(strategy)
    if ranks == sorted(ranks):
        return gathered
    pieces = tf.split(gathered, len(ranks))
    return tf.concat([pieces[rank] for rank in ranks], axis=0)


def replicas_of_worker(strategy):
    """The numbers of this process's replicas among all replicas of a strategy, a range."""
    if strategy.num_replicas_in_sync == 1:  # TensorFlow's own strategy knows no devices.
        return range(1)
    num_local = len(strategy.extended.worker_devices)
    if num_local == strategy.num_replicas_in_sync:
        return range(num_local)
    first = strategy.extended._get_replica_id_in_sync_group(0)
    return range(first, first + num_local)


def _everybody():
    """The groups of replicas that have a collective together: one of all, [1, R]."""
    return [list(range(tf.distribute.get_strategy().num_replicas_in_sync))]


def _launchers(strategy):
    # MirroredStrategy has them beside the reductions that its user may choose.
    extended = strategy.extended
    operations = getattr(extended, "_collective_ops", None) or extended._cross_device_ops
    return getattr(operations, "_launchers", None)


def _launch(launcher, collective, x, **kwargs):
    if x.dtype == tf.int32 and tf.DeviceSpec.from_string(launcher._device).device_type == "GPU":
        # There TensorFlow reduces int64 alone.
        return tf.cast(_launch(launcher, collective, tf.cast(x, tf.int64), **kwargs), tf.int32)
    options = launcher._options
    with tf.device(launcher._device):
        return collective(
            x,
            launcher._group_size,
            launcher._group_key,
            launcher._next_instance_key(),
            communication_hint=options.implementation.value,
            timeout=options.timeout_seconds or 0,
            # Without it the collectives of one replica start in any order, and wait for ever.
            ordering_token=launcher._get_ordering_token(),
            **kwargs,
        )


def _ranks(strategy):
    """List of the replicas' places in collectives."""
    num_local = len(strategy.extended.worker_devices)
    return [rank * num_local + i for rank in _worker_ranks(strategy) for i in range(num_local)]


def _worker_ranks(strategy):
    """List of the workers' places in collectives: TensorFlow sorts their names, 10 before 2."""
    resolver = getattr(strategy, "cluster_resolver", None)
    jobs = resolver.cluster_spec().as_dict() if resolver is not None else {}
    names = [
        f"/job:{job}/replica:0/task:{task}"
        for job in ("chief", "worker")  # in the order of their replicas
        for task in range(len(jobs.get(job, ())))
    ]
    return [sorted(names).index(name) for name in names] or [0]


def accumulated_gradients(optimizer, variables):
    """The slots in which a Keras optimizer adds up the gradients of variables."""
    slots = optimizer._accumulated_gradients
    return [slots[optimizer._get_variable_index(variable)] for variable in variables]


def moving_averages(optimizer):
    """List of pairs of a variable and its average in a Keras optimizer with `use_ema`."""
    averages = optimizer._model_variables_moving_average
    return list(zip(optimizer._trainable_variables, averages, strict=True))


def iterations(optimizer):
    """The variable that counts gradients; `optimizer.iterations` are those that it has applied."""
    return optimizer._iterations


def has_weight_decay(optimizer, variable):
    """Whether a Keras optimizer with `weight_decay` makes a variable decay."""
    return optimizer._use_weight_decay(variable)


def has_step_of_its_own(optimizer):
    """Whether a Keras optimizer does more in a step than to update each variable, as Nadam does."""
    return type(optimizer)._backend_update_step is not keras.Optimizer._backend_update_step


def begin_step(optimizer):
    """Does of a step what comes before the updates."""
    if has_step_of_its_own(optimizer):
        optimizer._backend_update_step([], [], optimizer.learning_rate)
