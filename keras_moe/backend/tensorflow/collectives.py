"""What the replicas of a strategy tell each other in the middle of a step.

Each function is called by all replicas, in the same order. Outside of a replica, and where there is
one alone, there is nobody to talk to, and each returns what it is given.
"""

import tensorflow as tf

from keras_moe.backend.tensorflow import replicas as internals
from keras_moe.backend.tensorflow import xla


def num_replicas():
    """R inside a replica, 1 outside."""
    context = tf.distribute.get_replica_context()
    return 1 if context is None else context.num_replicas_in_sync


def replica():
    """The number of this replica among all R."""
    return tf.distribute.get_replica_context().replica_id_in_sync_group


def of_replica(seed):
    """A seed made another on each of several replicas."""
    if num_replicas() == 1:
        return seed
    return tf.cast(tf.random.fold_in(tf.cast(seed, tf.int32), replica()), seed.dtype)


def can_communicate():
    """Whether replicas can talk to each other here.

    In a graph and not eagerly: there they run one after the other, and the first would wait for
    ever.
    """
    if tf.executing_eagerly() or num_replicas() == 1:
        return False
    return internals.has_collectives(tf.distribute.get_strategy())


def check_can_communicate():
    """Raises RuntimeError inside one of several replicas that can't talk to each other."""
    if num_replicas() == 1 or can_communicate():
        return
    if tf.executing_eagerly():
        raise RuntimeError(
            "With `expert_parallel=True` replicas exchange rows while they run, but eagerly they "
            "run one after the other. Compile the model without `run_eagerly`, and call "
            "`strategy.run` inside of a `tf.function`."
        )
    raise RuntimeError(
        "`expert_parallel=True` takes a strategy whose replicas have collectives of their own, as "
        "tf.distribute.MirroredStrategy over devices of one kind. Received: "
        f"{type(tf.distribute.get_strategy()).__name__}"
    )


def on_replicas(function, examples, variables):
    """Calls a function of the examples: here we are on a replica, which has its rows alone.

    Args:
        function: Of `examples`. With JAX it must not close over tensors.
        examples: Structure of tensors [T, ...].
        variables: Those that it reads. With JAX it finds its replica's rows in them.

    Returns:
        What it returns.
    """
    return function(examples)


def static_shapes():
    """Whether no shape may depend on the data, since XLA compiles."""
    return xla.compiling()


def in_turn(rounds, play, y):
    """Plays `rounds` rounds of y = play(i, y), the collectives of all replicas in order."""
    _, y = tf.while_loop(
        lambda i, _: i < rounds, lambda i, y: (i + 1, play(i, y)), (0, y), parallel_iterations=1
    )
    return y


def all_to_all(x):
    """Sends x[r] to replica r.

    Args:
        x: Tensor [R, ...], of the same shape on all replicas.

    Returns:
        Tensor [R, ...], entry r from replica r. Its gradient travels the same way back.
    """

    @tf.custom_gradient
    def exchange(x):
        return internals.all_to_all(x), internals.all_to_all

    return exchange(x) if x.dtype.is_floating else internals.all_to_all(x)


def all_sum(x):
    """The sum over all replicas.

    Args:
        x: Tensor of the same shape on all replicas.

    Returns:
        Tensor like `x`. Every replica's result depends on every replica's `x`, so its gradient is
        the sum of all replicas' gradients.
    """
    if not can_communicate():
        return x

    @tf.custom_gradient
    def total(x):
        return internals.all_reduce(x, "Add"), lambda upstream: internals.all_reduce(
            upstream, "Add"
        )

    return total(x) if x.dtype.is_floating else internals.all_reduce(x, "Add")


def total_size(size):
    """The sum over all replicas of a size, an integer or an int32 scalar.

    Where XLA compiles, all replicas have shapes alike.
    """
    return size * num_replicas() if xla.compiling() else all_sum(tf.convert_to_tensor(size))


def all_max(x):
    """The maximum over all replicas; it has no gradient."""
    return internals.all_reduce(x, "Max")


def is_chief(strategy=None):
    """Whether this process is the one that writes the files.

    Of the workers of a `MultiWorkerMirroredStrategy` one is: what each holds a part of, all must
    read, and one writes.

    Example:
    ```python
    checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer)
    folder = "checkpoints" if is_chief(strategy) else tempfile.mkdtemp()
    checkpoint.save(os.path.join(folder, "checkpoint"))  # by all workers
    ```

    Args:
        strategy: A `tf.distribute.Strategy`; defaults to that of the scope.

    Returns:
        A bool. With a strategy over one process, and without one, it is true.
    """
    strategy = strategy or tf.distribute.get_strategy()
    return 0 in internals.replicas_of_worker(strategy)
