"""The paper's translation model: an encoder and a decoder with a mixture of experts each."""

import functools

import keras

from keras_moe.arguments import as_sizes, check_size
from keras_moe.backend import compilation
from keras_moe.layers import AttentionLSTM, ProjectedLSTM
from keras_moe.models.presets import get_preset
from keras_moe.models.translating import translate
from keras_moe.models.translation_presets import TRANSLATION_PRESETS
from keras_moe.models.word_model import WordModel
from keras_moe.models.words import PADDING_ID, as_ids


@keras.saving.register_keras_serializable("keras_moe")
class TranslationModel(WordModel):
    """Predicts each next word piece of a translation (appendix E).

    GNMT (Wu et al., 2016, arXiv:1609.08144) with fewer layers. Encoder: embedding → LSTMs of both
    directions, added → mixture of experts → LSTM. Decoder: embedding → LSTM with attention to the
    encoder → mixture of experts → LSTM → softmax. Every layer but the softmax has dropout on its
    output, and a residual connection adds its input; the output of a mixture goes through a sigmoid
    before that.

    The model trains on pairs of a source and a target, int [B, S] and [B, T], and on the words
    behind those of the target, as a language model does; ids of 0 are padding and stand last:

    ```python
    model = keras_moe.models.TranslationModel.from_preset("MoE-32", vocabulary_size=8000, width=64)
    model.compile("adam")
    # Targets read [end, w1, ..., wn] and predict [w1, ..., wn, end].
    model.fit((source, target[:, :-1]), target[:, 1:])
    ```

    The loss is the mean cross-entropy per word piece, and the logs show its exponential as
    `perplexity`. A model for several languages learns which one to write from a first word of the
    source that stands for it, as "<2fr>".

    The paper counts the two directions of an encoder's first layer as two layers: GNMT has nine so,
    this model three. Only so do its 85M operations per word come out (see `footprint`).
    `num_lstms=(4, 2)` has one more LSTM between both directions and the mixture.

    Args:
        vocabulary_size: V, of source and target alike.
        width: D, the size of the embeddings and of every layer's output.
        encoder_middle: The layer before the encoder's last LSTM, from [B, S, D] to [B, S, D];
            called with the mask of the words if it supports masking. `None` for none.
        decoder_middle: The layer behind the decoder's first LSTM, likewise.
        lstm_units: Units of each LSTM, whose output is projected to D. Default: 4·D.
        num_lstms: Pair of integers: the LSTMs of the encoder, at least the two directions, and
            those of the decoder.
        attention: `"product"` for the paper's attention (equation 22), `"additive"` for GNMT's
            (equation 21).
        dropout: Part of every layer's output to drop in training.
        num_sampled: Words to draw for the softmax in training, where ids are sorted by decreasing
            frequency. Default: the whole softmax.
        seed: Integer, seed of the dropout and of the words drawn. The mixtures have their own.
        **kwargs: Keyword arguments of `keras.Model`, as `name` and `dtype`.

    Attributes:
        perplexity: The metric.

    Call arguments:
        inputs: Pair of the source and the target, ids [B, S] and [B, T] of any type.
        training: Whether to drop outputs and to add noise to the gating.

    Returns:
        Log-probabilities [B, T, V] of the word piece behind each of the target, in training as
        well; float32, or float64 where the model is. So does `predict`. In a graph nothing is
        computed of them unless somebody uses them: the loss of a training step starts from the
        hidden states.

    Raises:
        ValueError: If a size is not an integer of at least 1, `num_lstms` not a pair that has two
            LSTMs for the encoder, or there is no such attention.
    """

    def __init__(
        self,
        vocabulary_size,
        width,
        encoder_middle=None,
        decoder_middle=None,
        *,
        lstm_units=None,
        num_lstms=(3, 2),
        attention="product",
        dropout=0.4,
        num_sampled=None,
        seed=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.vocabulary_size = check_size("vocabulary_size", vocabulary_size)
        self.width = check_size("width", width)
        self.encoder_middle = encoder_middle
        self.decoder_middle = decoder_middle
        default_units = 4 * self.width
        self.lstm_units = check_size(
            "lstm_units", default_units if lstm_units is None else lstm_units
        )
        self.num_lstms = as_sizes("num_lstms", num_lstms, least=(2, 1))
        self.attention = attention
        self.seed = seed

        policy = {"dtype": self.dtype_policy}
        size = (self.vocabulary_size, self.width)
        self.source_embedding = keras.layers.Embedding(*size, **policy)
        self.target_embedding = keras.layers.Embedding(*size, **policy)
        self.both_directions = keras.layers.Bidirectional(
            self._make_lstm("encoder_lstm"), merge_mode="sum", **policy
        )
        encoder, decoder = self.num_lstms
        self.encoder_lstms = [self._make_lstm(f"encoder_lstm_{i}") for i in range(2, encoder)]
        self.attention_lstm = AttentionLSTM(
            self.lstm_units, self.width, attention, name="attention_lstm", **policy
        )
        self.decoder_lstms = [self._make_lstm(f"decoder_lstm_{i}") for i in range(1, decoder)]
        self.softmax = self.make_softmax(self.vocabulary_size, num_sampled, seed)
        self.dropout = keras.layers.Dropout(dropout, seed=seed, **policy)
        self.freeze_parts()

    @classmethod
    def from_preset(cls, preset, vocabulary_size, width=None, **kwargs):
        """Returns one of the paper's translation models.

        Args:
            preset: A name in `TRANSLATION_PRESETS`, or a `TranslationPreset`.
            vocabulary_size: V.
            width: D, to which all other sizes of a layer are scaled. Default: the paper's.
            **kwargs: Keyword arguments of the model; `seed` is also that of the gatings' noise,
                and a `name` begins those of the mixtures, under which the logs show their balance.

        Raises:
            ValueError: If there is no such preset, or its sizes can't be scaled to the width.
        """
        preset = get_preset(preset, TRANSLATION_PRESETS)
        if width is not None:
            preset = preset.scaled(width)
        seed, prefix = kwargs.get("seed"), f"{kwargs['name']}_" if "name" in kwargs else ""
        middles = [
            preset.make_middle(
                dtype=kwargs.get("dtype"),
                name=f"{prefix}{part}_moe",
                seed=None if seed is None else seed + i,  # Noise of their own.
            )
            for i, part in enumerate(("encoder", "decoder"))
        ]
        return cls(
            vocabulary_size,
            preset.width,
            *middles,
            lstm_units=preset.lstm_units,
            num_lstms=preset.num_lstms,
            **{"dropout": preset.dropout, **kwargs},
        )

    def _make_lstm(self, name):
        options = {"return_sequences": True, "name": name, "dtype": self.dtype_policy}
        return ProjectedLSTM(self.lstm_units, self.width, **options)

    def build(self, inputs_shape):
        """Builds all layers: training alone would leave the softmax out."""
        sequences = (None, None, self.width)
        self.source_embedding.build((None, None))
        self.target_embedding.build((None, None))
        self.attention_lstm.build(sequences, sequences)
        for layer in self.counted_layers:
            if layer is not None and not layer.built:  # What a configuration brings may be.
                layer.build(sequences)

    @property
    def counted_layers(self):
        """The layers whose operations `footprint` counts; some may be `None`."""
        encoder = [self.both_directions, *self.encoder_lstms, self.encoder_middle]
        decoder = [self.attention_lstm, *self.decoder_lstms, self.decoder_middle]
        return [*encoder, *decoder, self.softmax]

    def encode(self, source, training=None):
        """The encoder: source [B, S] to [B, S, D]. What is behind a source's end is meaningless."""
        source = as_ids(source)
        mask = source != PADDING_ID
        x = self.dropout(self.source_embedding(source), training=training)
        x = self.recur([self.both_directions, *self.encoder_lstms[:-1]], x, training, mask)
        x = self.mix(self.encoder_middle, x, mask, training)
        return self.recur(self.encoder_lstms[-1:], x, training, mask)

    def call(self, inputs, training=None):
        source, target = map(as_ids, _pair(inputs))
        encoded = self.encode(source, training)
        x = self.dropout(self.target_embedding(target), training=training)
        h = self.attention_lstm(x, encoded, source_mask=source != PADDING_ID)
        x += self.dropout(h, training=training)
        x = self.mix(self.decoder_middle, x, target != PADDING_ID, training)
        x = self.recur(self.decoder_lstms, x, training)
        return self.log_probabilities(x)

    def step(self, ids, states, memory):
        """One step of the decoder, for W hypotheses about each source.

        Args:
            ids: The words before, ids [B, W]; a padded one meets no experts.
            states: Those of the decoder's LSTMs, each a list of tensors [B, W, ...].
            memory: What `attention_lstm.attention.remember` makes of the encoder's output.

        Returns:
            Log-probabilities [B, W, V], the next states, and the attention [B, W, S].
        """
        ids = as_ids(ids)
        x = self.target_embedding(ids)
        h, state, attention = self.attention_lstm.step(x, states[0], memory)
        x, next_states = x + h, [state]
        x = self.mix(self.decoder_middle, x, ids != PADDING_ID, training=None)
        for lstm, state in zip(self.decoder_lstms, states[1:], strict=True):
            h, state = lstm.cell(x, state)
            x, next_states = x + h, [*next_states, state]
        return self.softmax(x), next_states, attention

    def translate(self, source, end_id, *, max_length=None, excluded=(), **options):
        """Translates by `beam_search`, each source as if it were alone.

        It runs in a graph as well, as a signature of `export_saved_model` is one, and faster: see
        `make_translate_function`.

        Args:
            source: Ids [B, S] of any type, padded with 0.
            end_id: The id of the end, which the model also reads before the first word.
            max_length: Integer or tensor [B]: the most words of a translation, the end counted.
                Default: twice as many as the source has, and ten.
            excluded: Ids that are never taken, as that of unknown words; padding never is.
            **options: `beam_width`, `length_penalty`, `coverage_penalty` and `max_steps` of
                `beam_search`.

        Returns:
            `Hypotheses`: `ids` int32 [B, W, L], `lengths` [B, W] and `scores` [B, W], for each
            source the best first.
        """
        return translate(self, source, end_id, max_length, excluded, **options)

    def make_translate_function(self, end_id, **options):
        """Compiles `translate` for sources of any size.

        ```python
        translate = model.make_translate_function(end_id=2, beam_width=4)
        ids = translate(source).ids[:, 0]  # the best translations
        ```

        Args:
            end_id: As in `translate`.
            **options: The other arguments of `translate`.

        Returns:
            Function of `source`, which reads the weights as they are when it is called. On Keras'
            JAX backend each size [B, S] is compiled by itself, and L is the most words there are.
        """
        function = functools.partial(self.translate, end_id=end_id, **options)
        return compilation.compiled_reading(self, function)

    def get_config(self):
        return {
            **super().get_config(),
            "vocabulary_size": self.vocabulary_size,
            "width": self.width,
            "encoder_middle": keras.saving.serialize_keras_object(self.encoder_middle),
            "decoder_middle": keras.saving.serialize_keras_object(self.decoder_middle),
            "lstm_units": self.lstm_units,
            "num_lstms": self.num_lstms,
            "attention": self.attention,
            "dropout": self.dropout.rate,
            "num_sampled": self.softmax.num_sampled,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config):
        parts = ("encoder_middle", "decoder_middle")
        middles = {p: keras.saving.deserialize_keras_object(config[p]) for p in parts}
        return super().from_config({**config, **middles})


def _pair(inputs):
    if not isinstance(inputs, (list, tuple)) or len(inputs) != 2:
        raise ValueError(
            "A translation model is called with a pair: the ids of the source and those of the "
            f"target, behind the end. Received: {inputs!r}"
        )
    return inputs
