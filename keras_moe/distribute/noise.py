"""Seeds that differ from replica to replica, and are the same when a step is recomputed."""

import keras

from keras_moe.backend import collectives, outer_recomputation


class ReplicaSeedGenerator(keras.random.SeedGenerator):
    """A `keras.random.SeedGenerator` that gives each of several replicas seeds of its own.

    Keras mirrors the state, so that all replicas would draw the same. With one replica, and outside
    of replicas, the seeds are those of the class that it extends. Inside of `tf.recompute_grad` the
    backward pass gets those of the forward pass again.
    """

    def __init__(self, seed=None, **kwargs):
        super().__init__(seed, **kwargs)
        self._draws = outer_recomputation.Draws()

    def next(self, ordered=True):
        return self._draws.next(lambda: self._next(ordered))

    def _next(self, ordered):
        return collectives.of_replica(super().next(ordered))
