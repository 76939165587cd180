"""Noisy top-k gating that doesn't see what all words of a batch have in common."""

import keras

import keras_moe


@keras.saving.register_keras_serializable("keras_moe_examples")
class NormalizedGating(keras_moe.NoisyTopKGating):
    """Noisy top-k gating behind a batch normalization; the experts get the words as they are.

    Without its part that is common to all words the input can neither prefer experts for all of
    them alike nor raise the noise for all. What is left is as large as noise. The moving averages,
    which take the place of the batch outside training, follow quickly: one that lags behind brings
    some of the common part back.
    """

    def build(self, input_shape):
        super().build(input_shape)
        self.normalization = keras.layers.BatchNormalization(
            momentum=0.95, center=False, scale=False, dtype="float32"
        )
        self.normalization.build(input_shape)

    def call(self, x, training=None, mask=None):
        x = self.normalization(x, training=training, mask=mask)
        return super().call(x, training=training, mask=mask)
