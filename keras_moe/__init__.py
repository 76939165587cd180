"""The sparsely-gated mixture-of-experts layer of Shazeer et al. (2017) for Keras 3."""

from keras_moe import backend  # noqa: F401  Before all else, which an unsupported one can't import.

# isort: split
from keras_moe import callbacks, distribute, layers, losses, models, optimizers
from keras_moe.experts.feed_forward import FeedForwardExperts
from keras_moe.experts.layer_experts import LayerExperts
from keras_moe.gating.hierarchical import HierarchicalGating
from keras_moe.gating.hierarchical_balanced import HierarchicalBalancedGating
from keras_moe.gating.noisy_top_k import NoisyTopKGating
from keras_moe.gating.routing import Routing
from keras_moe.gating.softmax import SoftmaxGating
from keras_moe.gating.strictly_balanced import StrictlyBalancedGating
from keras_moe.mixture.hierarchical_moe import HierarchicalMoE
from keras_moe.mixture.sparse_moe import SparseMoE
from keras_moe.saving import load_weights, save_weights
from keras_moe.serving import export_saved_model, token_signature
from keras_moe.surgery import dense_pairs, grow, prune, upcycle, upcycle_model, used_experts

__version__ = "0.2.0"

__all__ = [
    "FeedForwardExperts",
    "HierarchicalBalancedGating",
    "HierarchicalGating",
    "HierarchicalMoE",
    "LayerExperts",
    "NoisyTopKGating",
    "Routing",
    "SoftmaxGating",
    "SparseMoE",
    "StrictlyBalancedGating",
    "callbacks",
    "dense_pairs",
    "distribute",
    "export_saved_model",
    "grow",
    "layers",
    "load_weights",
    "losses",
    "models",
    "optimizers",
    "prune",
    "save_weights",
    "token_signature",
    "upcycle",
    "upcycle_model",
    "used_experts",
]
