"""What the models share that predict words: residual layers, the loss, and perplexity."""

import functools
import inspect

import keras
import numpy as np
from keras import ops

from keras_moe.backend import STATIC_SHAPES, vocabulary
from keras_moe.contract.freezing import FreezableParts
from keras_moe.layers import SampledSoftmax
from keras_moe.losses import in_floatx
from keras_moe.models.log_probabilities import for_log_probabilities
from keras_moe.models.words import (
    PADDING_ID,
    as_ids,
    mask_padding,
    table_of_weights,
    weights_of_words,
)


class WordModel(FreezableParts, keras.Model):
    """Layers with dropout and residual connections, and a softmax over words behind them.

    A subclass sets `dropout`, a layer, and `softmax`, a `SampledSoftmax`; its call returns what
    `log_probabilities` makes of its last layer. Targets are ids [B, L] of any type, padded with 0.

    `fit`, `evaluate` and `compile` take what they take of every Keras model:

    - `sample_weight` [B] or [B, L] weighs words. As Keras has it, the loss is the sum of weighted
      losses over the number of words, Σ w·loss / T, where T counts all words that aren't padding:
      half the weight is half the loss. The perplexity is the exponential of the weighted mean,
      Σ w·loss / Σ w.
    - `class_weight` gives each target word the weight of its id.
    - `loss` takes the place of the cross-entropy. It and `metrics` are called with targets [B, L]
      and log-probabilities [B, L, V], in training and in evaluation, with Keras' mask for padding:
      they return a number for each word, or one for the batch. Those that sample words in
      training have neither a `loss` nor metrics there: evaluation alone computes the whole softmax.

    The losses that layers add, as the balance losses of a mixture, stay as they are.

    Attributes:
        perplexity: The metric.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.autocast = False  # Ids in a floating-point type would lose digits.
        # The number of words that aren't padding is no static shape.
        self.supports_jit = STATIC_SHAPES
        self.perplexity = Perplexity(name="perplexity")
        self._has_metrics = False
        self._class_weights = None

    def make_softmax(self, vocabulary_size, num_sampled, seed):
        """Returns the softmax, in float32 where the model is narrower.

        Scores of sentences are sums of its log-probabilities, and in float16 no metric could tell
        the ids above 2048 apart.
        """
        dtype = keras.backend.result_type(self.compute_dtype, "float32")
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
        y = ops.cast(middle(x, training=training, **options), x.dtype)  # It has its own precision.
        return x + self.dropout(ops.sigmoid(y), training=training)

    def log_probabilities(self, hidden):
        """Hidden states [B, L, D] to log-probabilities [B, L, V], which keep them in mind.

        In training the cross-entropy starts from the hidden states. So nothing may need the whole
        softmax, and a graph, as that of `fit`, then doesn't compute it.
        """
        log_probs = self.softmax(hidden)
        vocabulary.remember(log_probs, hidden)
        return log_probs

    def cross_entropy(self, targets, predictions, training):
        """Loss of each word of targets [B, L] that isn't padding, from what `call` returned.

        With JAX, where no shape depends on data, of each position, 0 where there is no word.
        """
        targets = as_ids(targets)
        words = targets != PADDING_ID
        hidden = vocabulary.remembered(predictions)
        if training and hidden is not None:
            hidden, targets = (vocabulary.words_alone(x, words) for x in (hidden, targets))
            losses = self.softmax.sampled_loss(hidden, targets)
        else:
            losses = -vocabulary.words_alone(vocabulary.of_words(predictions, targets), words)
        is_word = vocabulary.is_word(words)
        return losses if is_word is None else ops.where(is_word, losses, 0.0)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The loss of `compile`, or else the mean cross-entropy per word; and those of layers."""
        y = as_ids(y)
        words = y != PADDING_ID
        losses = in_floatx(self.cross_entropy(y, y_pred, training))
        weights, is_word = weights_of_words(sample_weight, y), vocabulary.is_word(words)
        of_words = None if weights is None else vocabulary.words_alone(weights, words)
        if is_word is not None:
            counted = ops.cast(is_word, losses.dtype)
            of_words = counted if of_words is None else of_words * counted
        self.perplexity.update_state(losses, of_words)
        own = None
        if self.loss is None:
            # Of several replicas one may have no words. Keras takes the mean of all replicas.
            number = ops.size(losses) if is_word is None else ops.sum(ops.cast(is_word, "int32"))
            number = ops.cast(ops.maximum(number, 1), losses.dtype)
            own = ops.sum(losses if of_words is None else losses * of_words) / number
        if own is None or not STATIC_SHAPES:
            if own is not None:
                self.add_loss(own)
            return super().compute_loss(x, y, mask_padding(y_pred, y), weights, training)
        # Keras' JAX trainer has collected the losses of the call; it would not see another.
        return sum(self.losses, start=own)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        """Updates the metrics of `compile`, and returns the values of all."""
        y = as_ids(y)
        weights = weights_of_words(sample_weight, y)
        return super().compute_metrics(x, y, mask_padding(y_pred, y), weights)

    @property
    def losses(self):
        """The losses of the layers, in the one type in which Keras adds them up."""
        return [in_floatx(loss) for loss in super().losses]

    @functools.wraps(keras.Model.compile)
    def compile(self, *args, **kwargs):
        given = inspect.signature(super().compile).bind(*args, **kwargs).arguments
        for name in given.keys() & {"loss", "metrics", "weighted_metrics"}:
            given[name] = for_log_probabilities(given[name], is_loss=name == "loss")
        if given.get("loss_weights") is not None and given.get("loss") is None:
            raise ValueError(
                "`loss_weights` weighs the `loss` that is given beside it; without one, scale the "
                f"weights of words. Received: loss_weights={given['loss_weights']!r}"
            )
        self._has_metrics = bool(given.get("metrics") or given.get("weighted_metrics"))
        super().compile(**given)

    def compile_from_config(self, config):
        """Compiles a model from a file; Keras itself doesn't, where `compile` is overridden."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)  # Their values come from the file.

    @functools.wraps(keras.Model.fit)
    def fit(self, *args, **kwargs):
        return super().fit(**self._without_class_weight(super().fit, args, kwargs))

    @functools.wraps(keras.Model.train_on_batch)
    def train_on_batch(self, *args, **kwargs):
        return super().train_on_batch(
            **self._without_class_weight(super().train_on_batch, args, kwargs)
        )

    def _without_class_weight(self, method, args, kwargs):
        """The arguments of a call but `class_weight`, which is left to the training step.

        Keras takes the place of the largest id in a row of targets for the class of that row.
        """
        given = inspect.signature(method).bind(*args, **kwargs).arguments
        table = table_of_weights(given.pop("class_weight", None), self.vocabulary_size)
        if not np.array_equal(table, self._class_weights):
            self._class_weights = table
            self.train_function = None  # The one that is there has other weights in its graph.
        return given

    def train_step(self, *args):
        """One step of training, with the weights of classes: of data, under JAX behind a state."""
        *state, data = args
        if self.softmax.num_sampled is not None and (self._has_metrics or self.loss is not None):
            raise ValueError(
                "Training by a sample of the vocabulary computes no log-probabilities for `loss` "
                "and `metrics`. Make the model with `num_sampled=None`, or compile it without them "
                "to train it. Received: "
                f"num_sampled={self.softmax.num_sampled}, loss={self.loss!r}"
            )
        if self._class_weights is not None:
            x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
            if sample_weight is not None:
                raise ValueError(
                    "`class_weight` and `sample_weight` can't be given at the same time: multiply "
                    "them into one `sample_weight` [B, L]."
                )
            data = x, y, ops.take(self._class_weights, as_ids(y))
        return super().train_step(*state, data)


@keras.saving.register_keras_serializable("keras_moe")
class Perplexity(keras.metrics.Mean):
    """The exponential of the mean cross-entropy of all words seen, which may have weights.

    Example:
    ```python
    metric = keras_moe.models.Perplexity()
    metric.update_state([np.log(4.0), np.log(16.0)])  # Cross-entropies of two words.
    metric.result()  # 8.0
    ```

    Args:
        name: The metric's name.
        dtype: Its precision. Default: that of Keras' losses, but at least float32, as in float16
            no more than 2048 words could be counted.
    """

    def __init__(self, name="perplexity", dtype=None):
        if dtype is None:
            dtype = keras.backend.result_type(keras.config.floatx(), "float32")
        super().__init__(name=name, dtype=dtype)

    def result(self):
        """Returns the perplexity so far."""
        return ops.exp(super().result())
