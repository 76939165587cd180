"""An LSTM that reads, besides its input, what its last output attends to."""

import keras
from keras import ops

from keras_moe.arguments import check_size
from keras_moe.backend import recurrence
from keras_moe.contract.freezing import FreezableParts
from keras_moe.contract.inputs import as_input, as_mask
from keras_moe.layers.product_attention import AdditiveAttention, ProductAttention
from keras_moe.layers.projected_lstm import ProjectedLSTMCell

ATTENTIONS = {"product": ProductAttention, "additive": AdditiveAttention}


@keras.saving.register_keras_serializable("keras_moe")
class AttentionLSTM(FreezableParts, keras.layers.Layer):
    """The first LSTM of the paper's decoder: gives attention its query and receives the context.

    context_t = attention(h_{t-1}, memory),   h_t, c_t = LSTM([x_t, context_t], h_{t-1}, c_{t-1})

    as in GNMT (Wu et al., 2016, arXiv:1609.08144); h_0 and c_0 are zeros. The LSTM is a
    `ProjectedLSTMCell`.

    Example:
    ```python
    lstm = keras_moe.layers.AttentionLSTM(32, 8)
    h, weights = lstm(query, value, source != 0, return_attention_scores=True)
    ```

    Args:
        units: U, the size of the LSTM's memory c.
        projection: P, the size of the output h.
        attention: `"product"` (`ProductAttention`) or `"additive"` (`AdditiveAttention`), with P
            hidden units.
        **kwargs: Keyword arguments of `keras.layers.Layer`.

    Attributes:
        cell: The `ProjectedLSTMCell`.
        attention: The attention layer.

    Call arguments:
        x: Float tensor [B, T, D].
        source: Float tensor [B, S, V], what the steps attend to.
        source_mask: Boolean tensor [B, S]; nothing attends to what is `False`. `None`: all `True`.
        return_attention_scores: Whether to return the weights of the source steps, too.

    Returns:
        Outputs h [B, T, P]; with `return_attention_scores` also the weights [B, T, S].

    Raises:
        ValueError: If a size is not an integer of at least 1, or there is no such attention.
    """

    def __init__(self, units, projection, attention="product", **kwargs):
        super().__init__(**kwargs)
        if attention not in ATTENTIONS:
            raise ValueError(
                f"`attention` must be one of {', '.join(map(repr, ATTENTIONS))}. "
                f"Received: {attention!r}"
            )
        self.projection = check_size("projection", projection)
        self._attention_name = attention
        policy = {"dtype": self.dtype_policy}
        self.cell = ProjectedLSTMCell(units, self.projection, **policy, name="cell")
        self.attention = ATTENTIONS[attention](self.projection, **policy, name="attention")
        self.freeze_parts()

    def build(self, x_shape, source_shape):
        width = source_shape[-1]
        self.attention.build([(None, None, self.projection), (None, None, width)])
        self.cell.build((None, x_shape[-1] + width))

    def call(self, x, source, source_mask=None, return_attention_scores=False):
        x, source = as_input(self, x), as_input(self, source)
        memory = self.attention.remember(source, as_mask(source_mask, source))
        size, length = ops.shape(x)[0], ops.shape(x)[1]
        number = 1 + return_attention_scores

        def step(x, states):
            h, states, weights = self.step(x[:, None], states, memory)
            return [h[:, 0], weights[:, 0]][:number], states

        outputs = recurrence.over_time(step, x, self.initial_states(size, 1), number)
        outputs[0] = ops.reshape(outputs[0], (size, length, self.projection))
        return tuple(outputs) if return_attention_scores else outputs[0]

    def step(self, x, states, memory):
        """One step of Q sequences for each source.

        Args:
            x: Float tensor [B, Q, D].
            states: List of h [B, Q, P] and c [B, Q, U].
            memory: The `Memory` of the sources, by `attention.remember`.

        Returns:
            h [B, Q, P], the next states, and the weights of the source steps [B, Q, S].
        """
        context, weights = self.attention.attend(states[0], memory)
        h, states = self.cell(ops.concatenate([x, context], axis=-1), states)
        return h, states, weights

    def initial_states(self, size, number):
        """Zeros for `number` sequences for each of `size` sources."""
        sizes = self.cell.state_size
        return [ops.zeros((size, number, units), self.compute_dtype) for units in sizes]

    def compute_output_shape(self, x_shape, source_shape):
        return (*x_shape[:-1], self.projection)

    def get_config(self):
        return {
            **super().get_config(),
            "units": self.cell.units,
            "projection": self.projection,
            "attention": self._attention_name,
        }
