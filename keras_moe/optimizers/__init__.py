"""The paper's optimizer and its schedule of the learning rate."""

from keras_moe.optimizers.factored_adam import FactoredAdam
from keras_moe.optimizers.schedules import WarmupInverseSqrt

__all__ = ["FactoredAdam", "WarmupInverseSqrt"]
