"""Seeds that differ from replica to replica."""

import keras
import tensorflow as tf

from keras_moe.distribute import collectives


class ReplicaSeedGenerator(keras.random.SeedGenerator):
    """A `keras.random.SeedGenerator` that gives each of several replicas seeds of its own.

    Keras mirrors the state, so that all replicas would draw the same. With one replica, and outside
    of replicas, the seeds are those of the class that it extends.
    """

    def next(self, ordered=True):
        seed = super().next(ordered)
        if collectives.num_replicas() == 1:
            return seed
        folded = tf.random.fold_in(tf.cast(seed, tf.int32), collectives.replica())
        return tf.cast(folded, seed.dtype)
