"""Variables of which each replica holds a part of the rows."""

import contextlib

import keras
import numpy as np
import tensorflow as tf

from keras_moe.backend.tensorflow import replicas as internals
from keras_moe.backend.tensorflow.tracing import tracing_saved_model
from keras_moe.distribute.support import check_divides


class ShardedVariable(internals.VariableOfShards):
    """A variable [N, ...] of which replica r of R holds rows r·N/R to (r + 1)·N/R.

    Inside a replica of its strategy it reads as that replica's rows, and assigns them. Everywhere
    else it reads as all rows, and what is assigned to it is cut up. Its shape is that of all rows.

    Of a strategy over several workers each holds the rows of its own replicas alone. To read all
    rows there is a collective: all workers do it, or none. So are `numpy()`, saving weights and
    saving checkpoints, while to assign all rows, and so to load them, needs no other worker.

    Args:
        strategy: The strategy.
        shards: List of this worker's variables [N/R, ...], one on the device of each replica.
    """

    @property
    def num_shards(self):
        """R, over all workers."""
        return self.distribute_strategy.num_replicas_in_sync

    @property
    def _is_elsewhere(self):
        """Whether other workers hold rows."""
        return len(self.shards) < self.num_shards

    @property
    def values(self):
        # Asked for by `strategy.extended.update`, the way of every optimizer.
        raise RuntimeError(
            "A variable that is held in shards cannot be updated replica by replica from outside, "
            "as an optimizer does that knows nothing of shards. Wrap the optimizer: "
            "`keras_moe.distribute.ExpertParallel(optimizer)`. Received: an update of "
            f"{self.name!r} of shape {tuple(self.shape)}"
        )

    @property
    def shape(self):
        rows, *rest = self.shards[0].shape
        return tf.TensorShape([rows * self.num_shards, *rest])

    def get_shape(self):
        return self.shape

    def current(self):
        if self.shard is not None:
            return self.shard
        if tracing_saved_model():
            return self.in_saved_model.read_value()
        if not self._is_elsewhere:
            return self._rows_of_worker()
        with tf.device("CPU:0"):  # Where there is more room than on one replica's device.
            rows = self._rows_of_worker()
        try:
            return internals.gather_from_workers(self.distribute_strategy, rows)
        except (tf.errors.DeadlineExceededError, tf.errors.InternalError) as error:
            raise RuntimeError(
                "Workers hold a part of the rows each, so that all of them must read the variable, "
                "save the weights or save a checkpoint, and that in the same order; afterwards one "
                "alone may go on with the result. Another worker has done something else, or has "
                f"not come in time. Received: a read of {self.name!r} of shape {tuple(self.shape)}"
            ) from error

    def _rows_of_worker(self):
        # By the operation, since Keras' export stores all that a function has read by the method.
        read = tf.raw_ops.ReadVariableOp
        return tf.concat([read(resource=s.handle, dtype=s.dtype) for s in self.shards], axis=0)

    def value(self):
        return tf.identity(self.current())

    read_value = value

    @property
    def handle(self):
        if internals.on_tpu():
            return internals.handle_on_tpu(self)
        if self.shard is None:
            raise ValueError(
                "A variable that is held in shards has one handle on each replica, and none "
                f"outside. Received: {self.name!r} outside of the replicas of its strategy"
            )
        return self.shard.handle

    def numpy(self):
        if self._is_elsewhere:
            return np.asarray(self.current())
        # One shard after the other, so that there are never two copies of all rows.
        rows = np.empty(self.shape, self.dtype.as_numpy_dtype)
        for part, shard in zip(np.split(rows, len(self.shards)), self.shards, strict=True):
            part[...] = shard.numpy()
        return rows

    def __array__(self, dtype=None):  # noqa: D105
        return self.numpy().astype(dtype or self.dtype.as_numpy_dtype, copy=False)

    def gathered(self, name):
        """A variable of TensorFlow with all rows, on the host."""
        with tf.device("CPU:0"):
            return internals.make_component(initial_value=self.numpy(), name=name)

    def assign(self, value, use_locking=None, name=None, read_value=True):
        return self._update_shards("assign", value)

    def assign_add(self, value, use_locking=None, name=None, read_value=True):
        return self._update_shards("assign_add", value)

    def assign_sub(self, value, use_locking=None, name=None, read_value=True):
        return self._update_shards("assign_sub", value)

    def _update_shards(self, method, value):
        if self.shard is not None:
            return getattr(self.shard, method)(value)
        if isinstance(value, ShardedVariable):
            parts = value.shards
        else:
            parts = _parts_of_worker(self.distribute_strategy, value)
        for shard, part in zip(self.shards, parts, strict=True):
            with tf.device(shard.device):
                getattr(shard, method)(part)
        return self


@contextlib.contextmanager
def sharded_rows(number, unit="experts"):
    """Inside, variables [number, ...] are made in shards, where there are several replicas.

    Args:
        number: The number of rows.
        unit: What one row stands for, for the error message.

    Raises:
        ValueError: If the replicas cannot hold as many rows each.
    """
    strategy = tf.distribute.get_strategy()
    replicas = strategy.num_replicas_in_sync
    if replicas == 1:
        yield
        return
    check_divides(replicas, number, unit)
    with tf.variable_creator_scope(lambda next_creator, **kwargs: _create(strategy, **kwargs)):
        yield


def over_shards(regularizer):
    """Makes a regularizer that is a sum over the entries of a variable count all shards.

    Each replica adds the losses of its own rows, and Keras takes the mean over the replicas.
    """
    return None if regularizer is None else _OverShards(regularizer)


class _OverShards(keras.regularizers.Regularizer):
    """A class, as the setter of Keras 3.10 takes no function."""

    def __init__(self, regularizer):
        self.regularizer = regularizer

    def __call__(self, variable):
        value = getattr(variable, "value", variable)
        loss = self.regularizer(variable)
        if isinstance(value, ShardedVariable) and value.shard is not None:
            loss *= value.num_shards
        return loss


@contextlib.contextmanager
def sharded_like_references():
    """Inside, variables colocated with a sharded one, and with as many rows, are sharded alike."""

    def create(next_creator, **kwargs):
        reference = kwargs.get("colocate_with")
        if not isinstance(reference, ShardedVariable):
            return next_creator(**kwargs)
        kwargs["initial_value"] = value = _on_host(kwargs["initial_value"])
        if value.shape[:1] != reference.shape[:1]:
            return next_creator(**kwargs)
        return _create(reference.distribute_strategy, **kwargs)

    with tf.variable_creator_scope(create):
        yield


def _create(strategy, *, initial_value, name=None, dtype=None, trainable=None, **_):
    if tf.distribute.get_replica_context() is not None:
        raise RuntimeError(
            "A variable that is held in shards cannot be made inside of a replica. Build the model "
            "and its optimizer inside of `strategy.scope()` first. Received: a variable "
            f"{name!r} inside of `strategy.run`"
        )
    devices = strategy.extended.worker_devices
    shards = []
    for i, part in enumerate(_parts_of_worker(strategy, _on_host(initial_value))):
        with tf.device(devices[i]):
            shards.append(
                internals.make_component(
                    initial_value=part,
                    name=name if i == 0 else f"{name}/replica_{i}",
                    dtype=dtype,
                    trainable=trainable,
                )
            )
    return ShardedVariable(strategy, shards)


def _parts_of_worker(strategy, value):
    """The rows of all replicas, cut up: list of the parts of this worker's replicas."""
    mine = internals.replicas_of_worker(strategy)
    return tf.split(value, strategy.num_replicas_in_sync)[mine.start : mine.stop]


def _on_host(initial_value):
    """All rows, where there is more room than on one replica's device."""
    with tf.device("CPU:0"):
        return tf.convert_to_tensor(initial_value() if callable(initial_value) else initial_value)
