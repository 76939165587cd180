"""Mixtures made of trained layers: of dense ones, or with more or fewer experts."""

from keras_moe.surgery.dense_pairs import dense_pairs
from keras_moe.surgery.model_upcycling import upcycle_model
from keras_moe.surgery.resizing import grow, prune
from keras_moe.surgery.upcycling import upcycle
from keras_moe.surgery.usage import used_experts

__all__ = ["dense_pairs", "grow", "prune", "upcycle", "upcycle_model", "used_experts"]
