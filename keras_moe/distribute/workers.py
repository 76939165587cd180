"""The processes of a strategy over several machines."""

import tensorflow as tf

from keras_moe.distribute import internals


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
