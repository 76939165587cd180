"""What the models share that predict words: residual layers, the loss, and perplexity."""

import keras
import tensorflow as tf
from keras import ops

from keras_moe.freezing import FreezableParts
from keras_moe.layers import SampledSoftmax

PADDING_ID = 0


class WordModel(FreezableParts, keras.Model):
    """Layers with dropout and residual connections, and a softmax over words behind them.

    A subclass sets `dropout`, a layer, and `softmax`, a `SampledSoftmax`. Its call returns hidden
    states [B, L, D] in training and log-probabilities [B, L, V] otherwise; the targets are int
    [B, L], padded with 0.

    Attributes:
        perplexity: The metric.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_jit = False  # The number of words that aren't padding is no static shape.
        self.perplexity = Perplexity(name="perplexity")

    def make_softmax(self, vocabulary_size, num_sampled, seed, dtype=None):
        """Returns the softmax, in the model's precision or another one."""
        dtype = self.dtype_policy if dtype is None else dtype
        return SampledSoftmax(vocabulary_size, num_sampled, seed, dtype=dtype)

    def recur(self, lstms, x, training, mask=None):
        """Runs layers one after the other, each with its dropout and residual connection."""
        for lstm in lstms:
            x += self.dropout(lstm(x, mask=mask), training=training)
        return x

    def mix(self, middle, x, mask, training):
        """Runs a mixture of experts, or what stands in its place, behind a sigmoid; or nothing."""
        if middle is None:
            return x
        options = {"mask": mask} if middle.supports_masking else {}
        y = middle(x, training=training, **options)
        return x + self.dropout(ops.sigmoid(y), training=training)

    def cross_entropy(self, targets, predictions, training):
        """Loss of each word of targets [B, L] that isn't padding, from what `call` returned."""
        words = targets != PADDING_ID
        if training:
            return self.softmax.sampled_loss(predictions[words], targets[words])
        return -tf.gather(predictions, targets, batch_dims=2)[words]

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Mean cross-entropy per word, and the losses of the layers."""
        losses = self.cross_entropy(y, y_pred, training)
        self.perplexity.update_state(losses)
        # Of several replicas one may have no words. Keras takes the mean of all replicas.
        number = ops.cast(ops.maximum(ops.size(losses), 1), losses.dtype)
        self.add_loss(ops.sum(losses) / number)
        return super().compute_loss(x, y, y_pred, sample_weight, training)


@keras.saving.register_keras_serializable("keras_moe")
class Perplexity(keras.metrics.Mean):
    """The exponential of the mean cross-entropy of all words seen."""

    def result(self):
        """Returns the perplexity so far."""
        return ops.exp(super().result())
