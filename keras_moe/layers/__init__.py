"""What else the paper's models need."""

from keras_moe.layers.attention_lstm import AttentionLSTM
from keras_moe.layers.product_attention import AdditiveAttention, ProductAttention
from keras_moe.layers.projected_lstm import ProjectedLSTM, ProjectedLSTMCell
from keras_moe.layers.sampled_softmax import SampledSoftmax

__all__ = [
    "AdditiveAttention",
    "AttentionLSTM",
    "ProductAttention",
    "ProjectedLSTM",
    "ProjectedLSTMCell",
    "SampledSoftmax",
]
