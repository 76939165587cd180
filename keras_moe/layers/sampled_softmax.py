"""A softmax over a large vocabulary that is trained on samples of it."""

import keras
import numpy as np
from keras import ops

from keras_moe.arguments import check_size
from keras_moe.backend import STATIC_SHAPES, indices, vocabulary
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
        # The XLA of TensorFlow has no log-uniform sampler.
        self.supports_jit = num_sampled is None or STATIC_SHAPES
        if num_sampled is not None:
            self._sampler = vocabulary.LogUniformSampler(self.num_sampled, vocabulary_size, seed)
            self.seed_generator = self._sampler.generator

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
        drawn, target_chances, chances = self._sampler(targets, self.seed)
        targets = ops.cast(targets, "int32")
        words = ops.concatenate([targets, drawn])
        dtype = self._loss_dtype
        hidden = ops.cast(hidden, dtype)
        kernel = ops.cast(indices.gather(ops.transpose(self.kernel), words), dtype)
        bias = ops.cast(indices.gather(indices.tensor(self.bias), words), dtype)
        # Float32 as they come: the chance of a rare word is nothing in float16.
        bias -= ops.cast(ops.log(ops.concatenate([target_chances, chances])), dtype)

        num_targets = ops.shape(targets)[0]
        target = ops.sum(hidden * kernel[:num_targets], axis=1) + bias[:num_targets]
        others = ops.matmul(hidden, ops.transpose(kernel[num_targets:])) + bias[num_targets:]
        # A word is no rival of itself.
        others = ops.where(drawn == targets[:, None], _lowest(dtype), others)
        return vocabulary.cross_entropy_beside(target, others)

    @property
    def _loss_dtype(self):
        """The precision of the variables, but at least float32."""
        return keras.backend.result_type(self.variable_dtype, "float32")

    def _whole_loss(self, hidden, targets):
        # Not in the precision of a layer around this one, to which Keras casts what is read.
        dtype = self.variable_dtype
        hidden, kernel, bias = (ops.cast(x, dtype) for x in (hidden, self.kernel, self.bias))
        logits = ops.cast(ops.matmul(hidden, kernel) + bias, self._loss_dtype)
        return vocabulary.cross_entropy(ops.cast(targets, "int32"), logits)

    def get_config(self):
        layer = keras.layers.Layer.get_config(self)  # Dense has options that are fixed here.
        return {
            **layer,
            "vocabulary_size": self.units,
            "num_sampled": self.num_sampled,
            "seed": self.seed,
        }


def _lowest(dtype):
    return float(np.finfo(dtype).min)
