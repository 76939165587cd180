"""The models whose training step `tpu_programs.py` compiles, and how many words a chip has."""

import keras

from keras_moe import SparseMoE
from keras_moe.models import LanguageModel
from keras_moe.models.presets import get_preset

WORDS = 32  # of a sentence
SENTENCES = 128  # for each chip
VOCABULARY = 20_000
BLOCK = "Transformer block"
BLOCK_WIDTH, BLOCK_UNITS, BLOCK_EXPERTS, BLOCK_K = 1024, 4096, 64, 2


class Block(keras.Model):
    """A Transformer block whose feed-forward part is a mixture."""

    def __init__(self, **options):
        super().__init__()
        self.attention = keras.layers.MultiHeadAttention(16, BLOCK_WIDTH // 16)
        self.norms = [keras.layers.LayerNormalization() for _ in range(2)]
        self.middle = SparseMoE(BLOCK_EXPERTS, BLOCK_UNITS, BLOCK_K, **options)

    def build(self, shape):
        for norm in self.norms:
            norm.build(shape)
        self.attention.build(shape, shape)
        self.middle.build(shape)

    def call(self, x, training=None):
        y = self.norms[0](x)
        x = x + self.attention(y, y, training=training)
        return x + self.middle(self.norms[1](x), training=training)


def make_model(name, capacity):
    """A model by its name, its experts divided among the replicas."""
    options = {"capacity_factor": capacity, "expert_parallel": True}
    if name == BLOCK:
        model = Block(**options)
        model.build((None, WORDS, BLOCK_WIDTH))
        return model
    preset = get_preset(name)
    middle = preset.make_middle()
    model = LanguageModel(
        VOCABULARY,
        preset.width,
        type(middle).from_config({**middle.get_config(), **options}),
        lstm_units=preset.lstm_units,
        num_lstms=preset.num_lstms,
        dropout=preset.dropout,
        num_sampled=None,
    )
    model.build((None, WORDS))
    return model
