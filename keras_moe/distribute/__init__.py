"""Expert parallelism under `tf.distribute`: mirrored layers, experts divided among the replicas."""

from keras_moe.distribute.optimizer import ExpertParallel

__all__ = ["ExpertParallel"]
