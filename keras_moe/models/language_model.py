"""The paper's language model: embedding → LSTM → mixture of experts → LSTM → softmax."""

import keras

from keras_moe.arguments import check_size
from keras_moe.layers import ProjectedLSTM
from keras_moe.layers.orthogonal import Orthogonal
from keras_moe.models.presets import get_preset
from keras_moe.models.word_model import WordModel
from keras_moe.models.words import PADDING_ID, as_ids


@keras.saving.register_keras_serializable("keras_moe")
class LanguageModel(WordModel):
    """Predicts each next word from the words before it (appendix C).

    embedding → LSTMs → middle → LSTMs → softmax. Every layer but the softmax has dropout on its
    output, and a residual connection adds its input; the output of the middle, the mixture of
    experts, goes through a sigmoid before that. The model trains on pairs of inputs and targets,
    both int [B, L], where each target is the word behind the input:

    ```python
    model = keras_moe.models.LanguageModel.from_preset("MoE-256", vocabulary_size=20_000, width=64)
    model.compile("adam")
    model.fit(inputs, targets)
    ```

    The loss is the mean cross-entropy per word, and the logs show its exponential as `perplexity`.
    Every word counts, the end of a sentence as well, and padding does not. Training computes the
    softmax over a sample of the vocabulary, so that its perplexity is lower than that of the whole
    softmax, which evaluation computes.

    A row of a batch is a text of its own: no state is carried from a batch to the next, since the
    sentences of the paper's benchmark come shuffled. Padding stands behind the words.

    Args:
        vocabulary_size: V. Ids are sorted by decreasing frequency; 0 is padding.
        width: D, the size of the embedding and of every layer's output.
        middle: The layer in the middle of the LSTMs, from [B, L, D] to [B, L, D]; called with the
            mask of the words if it supports masking. `None` for a model of LSTMs alone.
        lstm_units: Units of each LSTM, whose output is projected to D (`ProjectedLSTM`). Default:
            D units without projection.
        num_lstms: Number of LSTMs.
        dropout: Part of every layer's output to drop in training.
        num_sampled: Words to draw for the softmax in training; `None` for the whole softmax.
        seed: Integer, seed of the dropout and of the words drawn, so that several models can have
            the same. The middle has its own.
        **kwargs: Keyword arguments of `keras.Model`, as `name` and `dtype`.

    Attributes:
        perplexity: The metric.

    Call arguments:
        tokens: Ids [B, L], of any type that holds them.
        training: Whether to drop outputs and to add noise to the gating.

    Returns:
        Log-probabilities [B, L, V] of the word behind each, in training as well; float32, or
        float64 where the model is. So does `predict`. In a graph nothing is computed of them
        unless somebody uses them: the loss of a training step starts from the hidden states.

    Raises:
        ValueError: If a size is not an integer of at least 1.
    """

    def __init__(
        self,
        vocabulary_size,
        width,
        middle=None,
        *,
        lstm_units=None,
        num_lstms=2,
        dropout=0.1,
        num_sampled=1024,
        seed=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.vocabulary_size = check_size("vocabulary_size", vocabulary_size)
        self.width = check_size("width", width)
        self.middle = middle
        self.lstm_units = lstm_units
        self.num_lstms = check_size("num_lstms", num_lstms)
        self.seed = seed

        policy = {"dtype": self.dtype_policy}
        self.embedding = keras.layers.Embedding(self.vocabulary_size, self.width, **policy)
        self.lstms = [self._make_lstm(f"lstm_{i}") for i in range(self.num_lstms)]
        self.softmax = self.make_softmax(self.vocabulary_size, num_sampled, seed)
        self.dropout = keras.layers.Dropout(dropout, seed=seed, **policy)
        self.freeze_parts()

    @classmethod
    def from_preset(cls, preset, vocabulary_size, width=None, **kwargs):
        """Returns the model of a row of Table 7 or Table 8.

        Args:
            preset: A name in `PRESETS`, or a `Preset`.
            vocabulary_size: V.
            width: D, to which all other sizes of a layer are scaled. Default: the paper's.
            **kwargs: Keyword arguments of the model; `seed` is also that of the gating's noise,
                and a `name` also that of the mixture, under which the logs show its balance.

        Raises:
            ValueError: If there is no such preset, or its sizes can't be scaled to the width.
        """
        preset = get_preset(preset)
        if width is not None:
            preset = preset.scaled(width)
        shared = {name: kwargs[name] for name in ("dtype", "name", "seed") if name in kwargs}
        return cls(
            vocabulary_size,
            preset.width,
            preset.make_middle(**shared),
            lstm_units=preset.lstm_units,
            num_lstms=preset.num_lstms,
            **{"dropout": preset.dropout, **kwargs},
        )

    def _make_lstm(self, name):
        options = {"return_sequences": True, "name": name, "dtype": self.dtype_policy}
        if self.lstm_units is None:
            return keras.layers.LSTM(self.width, recurrent_initializer=Orthogonal(), **options)
        return ProjectedLSTM(self.lstm_units, self.width, **options)

    def build(self, tokens_shape):
        """Builds all layers: training alone would leave the softmax out."""
        layers = [*self.lstms, self.softmax]
        if self.middle is not None:
            layers.insert(len(self.lstms_in), self.middle)
        self.embedding.build(tokens_shape)
        for layer in layers:
            if not layer.built:  # What a configuration brings may be.
                layer.build((*tokens_shape, self.width))

    @property
    def lstms_in(self):
        """The LSTMs before the middle; the greater half."""
        return self.lstms[: (self.num_lstms + 1) // 2]

    @property
    def lstms_out(self):
        """The LSTMs behind the middle."""
        return self.lstms[(self.num_lstms + 1) // 2 :]

    @property
    def counted_layers(self):
        """The layers whose operations `footprint` counts; some may be `None`."""
        return [*self.lstms, self.middle]

    def encode(self, tokens, training=None):
        """What the middle sees: tokens [B, L] to [B, L, D]."""
        x = self.dropout(self.embedding(as_ids(tokens)), training=training)
        return self.recur(self.lstms_in, x, training)

    def call(self, tokens, training=None):
        tokens = as_ids(tokens)
        x = self.encode(tokens, training)
        x = self.mix(self.middle, x, tokens != PADDING_ID, training)
        x = self.recur(self.lstms_out, x, training)
        return self.log_probabilities(x)

    def get_config(self):
        return {
            **super().get_config(),
            "vocabulary_size": self.vocabulary_size,
            "width": self.width,
            "middle": keras.saving.serialize_keras_object(self.middle),
            "lstm_units": self.lstm_units,
            "num_lstms": self.num_lstms,
            "dropout": self.dropout.rate,
            "num_sampled": self.softmax.num_sampled,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config):
        middle = keras.saving.deserialize_keras_object(config["middle"])
        return super().from_config({**config, "middle": middle})
