"""What expert parallelism needs of TensorFlow that is not public, all of it in this one file.

Checked with TensorFlow 2.21. `tf.distribute` has no public variable that is held in shards, no
all-to-all, and no collective that a replica may launch without waiting in `merge_call` for the
others: that would let them run into the same Keras layer meanwhile. But a strategy has launchers
of collectives, one for each replica, and its own variables are built of one component for each.
"""

import tensorflow as tf
from tensorflow.python.distribute.values import DistributedVariable
from tensorflow.python.distribute.values_util import get_current_replica_id_as_int
from tensorflow.python.ops import collective_ops
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext
from tensorflow.python.ops.resource_variable_ops import ResourceVariable, UninitializedVariable

__all__ = ["DistributedVariable", "UninitializedVariable"]


def local_replica():
    """The number of the current replica, or of the one that is being updated; `None` outside."""
    return get_current_replica_id_as_int()


def make_component(**kwargs):
    """Makes a variable on the current device that no strategy makes into another."""
    return ResourceVariable(**kwargs)


def compiling():
    """Whether XLA is going to compile what is being traced."""
    graph = tf.compat.v1.get_default_graph()
    return not tf.executing_eagerly() and GraphOrParentsInXlaContext(graph)


def has_collectives(strategy):
    """Whether the replicas of a strategy can launch collectives."""
    return bool(_launchers(strategy))


def all_to_all(x):
    """Sends x[r] to replica r and returns what all have sent, [R, ...], without a gradient."""
    return _launch(collective_ops.all_to_all_v2, x)


def all_reduce(x, merge_op):
    """The sum ("Add") or the maximum ("Max") over all replicas, without a gradient."""
    return _launch(collective_ops.all_reduce_v2, x, merge_op=merge_op)


def _launchers(strategy):
    # MirroredStrategy has them beside the reductions that its user may choose.
    extended = strategy.extended
    operations = getattr(extended, "_collective_ops", None) or extended._cross_device_ops
    return getattr(operations, "_launchers", None)


def _launch(collective, x, **kwargs):
    launcher = _launchers(tf.distribute.get_strategy())[local_replica()]
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
