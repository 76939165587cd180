"""Expert parallelism: mirrored layers, experts divided among the replicas.

Replicas are those of a strategy of `tf.distribute`, or with JAX of a distribution of
`keras.distribution`.
"""

from keras_moe.backend import NAME, collectives

if NAME == "tensorflow":
    from keras_moe.distribute.optimizer import ExpertParallel
else:
    from keras_moe.distribute.any_optimizer import ExpertParallel

is_chief = collectives.is_chief

__all__ = ["ExpertParallel", "is_chief"]
