"""A softmax over a large vocabulary that is trained on samples of it."""

import keras
import tensorflow as tf
from keras import ops

from keras_moe.arguments import check_size
from keras_moe.contract.inputs import as_input


@keras.saving.register_keras_serializable("keras_moe")
class SampledSoftmax(keras.layers.Dense):
    """A softmax trained by importance sampling with a log-uniform sampler (appendix C).

    A call computes the whole softmax: V numbers for each word. `sampled_loss` estimates the loss
    of a training step from the target words and `num_sampled` others alone, the same for the whole
    batch, drawn without replacement: word i with a probability ∝ log((i + 2) / (i + 1)), as fits
    Zipf's law (Jean et al., 2015, arXiv:1412.2007).

    Example:
    ```python
    softmax = keras_moe.layers.SampledSoftmax(vocabulary_size=100, num_sampled=10)
    log_probabilities = softmax(hidden)
    loss = softmax.sampled_loss(hidden, targets)
    ```

    Args:
        vocabulary_size: V; ids are sorted by decreasing frequency, as the sampler supposes.
        num_sampled: Words drawn per batch; at most all of them. `None` draws none: `sampled_loss`
            is then the cross-entropy of the whole softmax, and the order of the ids is free.
        seed: Integer, seed of the draws.
        **kwargs: Keyword arguments of `keras.layers.Layer`.

    Attributes:
        kernel: Variable [D, V].
        bias: Variable [V].

    Call arguments:
        hidden: Float tensor [..., D].

    Returns:
        Log-probabilities [..., V].

    Raises:
        ValueError: If a size is not an integer of at least 1.
    """

    def __init__(self, vocabulary_size, num_sampled=1024, seed=None, **kwargs):
        vocabulary_size = check_size("vocabulary_size", vocabulary_size)
        super().__init__(vocabulary_size, activation="log_softmax", **kwargs)
        if num_sampled is not None:
            num_sampled = min(check_size("num_sampled", num_sampled), vocabulary_size)
        self.num_sampled = num_sampled
        self.seed = seed
        self.supports_jit = num_sampled is None  # XLA has no log-uniform sampler.

    def call(self, hidden, training=None):
        return super().call(as_input(self, hidden), training=training)

    def sampled_loss(self, hidden, targets):
        """Estimates the cross-entropy of targets, as a training step needs it.

        Args:
            hidden: Float tensor [T, D].
            targets: Ids [T], of any type that holds them.

        Returns:
            Float tensor [T], in float32 where the layer is narrower.
        """
        if self.num_sampled is None:
            return self._whole_loss(hidden, targets)
        drawn, target_chances, chances = tf.random.log_uniform_candidate_sampler(
            tf.cast(targets, "int64")[:, None],
            num_true=1,
            num_sampled=self.num_sampled,
            unique=True,
            range_max=self.units,
            seed=self.seed,
        )
        targets, drawn = tf.cast(targets, "int32"), tf.cast(drawn, "int32")
        words = tf.concat([targets, drawn], axis=0)
        dtype = self._loss_dtype
        hidden = tf.cast(hidden, dtype)
        kernel = tf.cast(tf.gather(tf.transpose(self.kernel), words), dtype)
        bias = tf.cast(tf.gather(tf.convert_to_tensor(self.bias), words), dtype)
        # Float32 as they come: the chance of a rare word is nothing in float16.
        bias -= tf.cast(tf.math.log(tf.concat([target_chances[:, 0], chances], axis=0)), dtype)

        num_targets = tf.shape(targets)[0]
        target = tf.reduce_sum(hidden * kernel[:num_targets], axis=1) + bias[:num_targets]
        others = tf.matmul(hidden, kernel[num_targets:], transpose_b=True)
        others = tf.nn.bias_add(others, bias[num_targets:])
        # A word is no rival of itself.
        others = tf.where(drawn == targets[:, None], others.dtype.min, others)
        return _cross_entropy(target, others)

    @property
    def _loss_dtype(self):
        """The precision of the variables, but at least float32."""
        return keras.backend.result_type(self.variable_dtype, "float32")

    def _whole_loss(self, hidden, targets):
        # Not in the precision of a layer around this one, to which Keras casts what is read.
        dtype = self.variable_dtype
        hidden, kernel, bias = (ops.cast(x, dtype) for x in (hidden, self.kernel, self.bias))
        logits = ops.cast(ops.matmul(hidden, kernel) + bias, self._loss_dtype)
        return tf.nn.sparse_softmax_cross_entropy_with_logits(tf.cast(targets, "int32"), logits)

    def get_config(self):
        layer = keras.layers.Layer.get_config(self)  # Dense has options that are fixed here.
        return {
            **layer,
            "vocabulary_size": self.units,
            "num_sampled": self.num_sampled,
            "seed": self.seed,
        }


@tf.custom_gradient
def _cross_entropy(target, others):
    """-log of the softmax of one logit beside others: [T] and [T, S] to [T].

    TensorFlow's takes both in one tensor, and labels as large: copies that cost as much again.
    """
    largest = tf.maximum(tf.reduce_max(others, axis=1), target)
    target_share = tf.exp(target - largest)
    shares = tf.exp(others - largest[:, None])
    total = tf.reduce_sum(shares, axis=1) + target_share

    def gradient(upstream):
        scale = upstream / total
        return scale * target_share - upstream, scale[:, None] * shares

    return tf.math.log(total) + largest - target, gradient
