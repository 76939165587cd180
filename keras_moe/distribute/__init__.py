"""Expert parallelism under `tf.distribute`: mirrored layers, experts divided among the replicas."""

from keras_moe.distribute.optimizer import ExpertParallel
from keras_moe.distribute.workers import is_chief

__all__ = ["ExpertParallel", "is_chief"]
