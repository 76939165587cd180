"""Mixtures made of trained layers: of dense ones, or with more or fewer experts."""

from keras_moe.surgery.resizing import grow, prune
from keras_moe.surgery.upcycling import upcycle
from keras_moe.surgery.usage import used_experts

__all__ = ["grow", "prune", "upcycle", "used_experts"]
