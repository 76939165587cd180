"""The paper's language model: embedding → LSTM → middle → LSTM → softmax (appendix C)."""

import keras
import tensorflow as tf
from keras import ops
from text import PADDING_ID


class WordModel(keras.Model):
    """Predicts each next word from the words before it.

    Training computes the softmax over a sample of the vocabulary, evaluation over all of it.

    Args:
        vocabulary_size: V. Ids are sorted by decreasing frequency; 0 is padding.
        width: D, the units of every layer.
        middle: The layer between the LSTMs, from [B, L, D] to [B, L, D].
        dropout: Part of every layer's output to drop in training.
        num_sampled: Words to draw for the softmax in training.
        seed: Integer, seed of the dropout and of the words drawn, so that several models can have
            the same. The middle has its own.
    """

    def __init__(self, vocabulary_size, width, middle, dropout=0.1, num_sampled=1024, seed=None):
        super().__init__()
        self.width = width
        self.embedding = keras.layers.Embedding(vocabulary_size, width)
        self.lstm_in = keras.layers.LSTM(width, return_sequences=True)
        self.middle = middle
        self.lstm_out = keras.layers.LSTM(width, return_sequences=True)
        self.softmax = SampledSoftmax(vocabulary_size, num_sampled, seed)
        self.dropout = keras.layers.Dropout(dropout, seed=seed)

    def build(self, tokens_shape):
        """Builds all layers: training alone would leave the softmax out."""
        self.embedding.build(tokens_shape)
        for layer in (self.lstm_in, self.middle, self.lstm_out, self.softmax):
            layer.build((*tokens_shape, self.width))

    def encode(self, tokens, training=None):
        """What the middle layer sees: tokens [B, L] to [B, L, D]."""
        x = self.dropout(self.embedding(tokens), training=training)
        return x + self.dropout(self.lstm_in(x), training=training)

    def call(self, tokens, training=None):
        """Hidden states [B, L, D] in training, otherwise log-probabilities [B, L, V]."""
        x = self.encode(tokens, training)
        y = self.middle(x, training=training, mask=tokens != PADDING_ID)
        x += self.dropout(ops.sigmoid(y), training=training)
        x += self.dropout(self.lstm_out(x), training=training)
        return x if training else self.softmax(x)

    def cross_entropy(self, targets, predictions, training):
        """Loss of each word of targets [B, L] that isn't padding, from what `call` returned."""
        words = targets != PADDING_ID
        if training:
            return self.softmax.sampled_loss(predictions[words], targets[words])
        return -tf.gather(predictions, targets, batch_dims=2)[words]


class SideBySide(keras.Model):
    """Trains several models on the same batches at the same time, each as if it were alone.

    Args:
        models: `WordModel`s by name. The logs show the perplexity of each under its name.
    """

    def __init__(self, models):
        super().__init__()
        self.models = models
        self.perplexities = {name: Perplexity(name=f"{name}/perplexity") for name in models}

    def build(self, tokens_shape):
        """Builds the models that aren't built yet."""
        for model in self.models.values():
            if not model.built:
                model.build(tokens_shape)

    def call(self, tokens, training=None):
        """The models' outputs by name."""
        return {name: model(tokens, training=training) for name, model in self.models.items()}

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Mean cross-entropy per word of each model and the losses of its layers, added up."""
        total = sum(self.losses)
        for name, model in self.models.items():
            losses = model.cross_entropy(y, y_pred[name], training)
            self.perplexities[name].update_state(losses)
            total += tf.reduce_mean(losses)
        return total


class SampledSoftmax(keras.layers.Dense):
    """A softmax trained by importance sampling with a log-uniform sampler.

    Args:
        vocabulary_size: V; ids are sorted by decreasing frequency, as the sampler supposes.
        num_sampled: Words drawn per batch.
        seed: Integer, seed of the draws.
    """

    def __init__(self, vocabulary_size, num_sampled, seed=None):
        super().__init__(vocabulary_size, activation="log_softmax")
        self.seed = seed
        self.num_sampled = min(num_sampled, vocabulary_size)

    def sampled_loss(self, hidden, targets):
        """Estimates the cross-entropy: hidden [T, D] and targets [T] to [T]."""
        return tf.nn.sampled_softmax_loss(
            weights=tf.transpose(self.kernel),
            biases=tf.convert_to_tensor(self.bias),
            labels=targets[:, None],
            inputs=hidden,
            num_sampled=self.num_sampled,
            num_classes=self.units,
            seed=self.seed,
        )


class Perplexity(keras.metrics.Mean):
    """The exponential of the mean cross-entropy of all words seen."""

    def result(self):
        """Returns the perplexity so far."""
        return ops.exp(super().result())


def footprint(model):
    """Operations per word and parameters of a `WordModel` as Table 7 counts them.

    Operations are the multiply-adds of the matrices that a word meets, the gating's included;
    embedding and softmax are left out of both.

    Returns:
        A pair of integers (ops/timestep, parameters).
    """
    operations = parameters = 0
    for layer in (model.lstm_in, model.middle, model.lstm_out):
        for weight in layer.trainable_weights:
            size = int(ops.size(weight))
            parameters += size
            if len(weight.shape) == 3:  # A bank of experts [N, D, F], K of which a word meets.
                operations += size * layer.k // layer.num_experts
            elif len(weight.shape) == 2:  # A bias multiplies nothing.
                operations += size
    return operations, parameters
