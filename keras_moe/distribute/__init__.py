"""Expert parallelism under `tf.distribute`: mirrored layers, experts divided among the replicas."""

from keras_moe.backend import NAME, collectives

if NAME == "tensorflow":
    from keras_moe.distribute.optimizer import ExpertParallel
else:
    from keras_moe.distribute.support import RefusedExpertParallel as ExpertParallel

is_chief = collectives.is_chief

__all__ = ["ExpertParallel", "is_chief"]
