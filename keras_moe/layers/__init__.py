"""What else the paper's models need."""

from keras_moe.layers.projected_lstm import ProjectedLSTM, ProjectedLSTMCell
from keras_moe.layers.sampled_softmax import SampledSoftmax

__all__ = ["ProjectedLSTM", "ProjectedLSTMCell", "SampledSoftmax"]
