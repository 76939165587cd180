"""LSTM with recurrent projection (Sak, Senior and Beaufays, 2014, arXiv:1402.1128)."""

import keras
from keras import ops

from keras_moe.arguments import check_size
from keras_moe.contract.freezing import FreezableParts
from keras_moe.contract.inputs import as_input, as_mask
from keras_moe.layers.orthogonal import Orthogonal


@keras.saving.register_keras_serializable("keras_moe")
class ProjectedLSTMCell(keras.layers.Layer):
    """One step of an LSTM whose output is projected to a smaller one, which is then fed back.

    i, f, g, o = split(x·W + h·R + b),   c' = σ(f)·c + σ(i)·tanh(g),   h' = (σ(o)·tanh(c'))·P

    Without the projection P this is `keras.layers.LSTMCell`. There are no peepholes.

    Example:
    ```python
    cell = keras_moe.layers.ProjectedLSTMCell(32, 8)
    states = [ops.zeros((2, 8)), ops.zeros((2, 32))]
    h, states = cell(ops.ones((2, 4)), states)
    ```

    Args:
        units: U, the size of the memory c.
        projection: P, the size of the output h.
        **kwargs: Keyword arguments of `keras.layers.Layer`.

    Attributes:
        kernel: Variable W [D, 4·U].
        recurrent_kernel: Variable R [P, 4·U].
        bias: Variable b [4·U], 1 for the forget gate at first.
        projection_kernel: Variable P [U, P].

    Call arguments:
        x: Float tensor [B, D].
        states: The list of h [B, P] and c [B, U].

    Returns:
        h' [B, P] and the list of h' and c'.

    Raises:
        ValueError: If a size is not an integer of at least 1.
    """

    def __init__(self, units, projection, **kwargs):
        super().__init__(**kwargs)
        self.units = check_size("units", units)
        self.projection = check_size("projection", projection)
        self.state_size = [self.projection, self.units]
        self.output_size = self.projection

    def build(self, input_shape):
        gates = 4 * self.units
        self.kernel = self.add_weight(name="kernel", shape=(input_shape[-1], gates))
        self.recurrent_kernel = self.add_weight(
            name="recurrent_kernel", shape=(self.projection, gates), initializer=Orthogonal()
        )
        self.bias = self.add_weight(name="bias", shape=(gates,), initializer=self._initial_bias)
        self.projection_kernel = self.add_weight(
            name="projection_kernel", shape=(self.units, self.projection)
        )

    def _initial_bias(self, shape, dtype=None):
        """Ones for the forget gate, the second of four, as in `keras.layers.LSTM`."""
        return ops.repeat(ops.array([0, 1, 0, 0], dtype), self.units)

    def call(self, x, states):
        x, h, c = (as_input(self, value) for value in (x, *states))
        z = ops.matmul(x, self.kernel) + ops.matmul(h, self.recurrent_kernel) + self.bias
        i, f, g, o = ops.split(z, 4, axis=-1)
        c = ops.sigmoid(f) * c + ops.sigmoid(i) * ops.tanh(g)
        h = ops.matmul(ops.sigmoid(o) * ops.tanh(c), self.projection_kernel)
        return h, [h, c]

    def get_config(self):
        return {**super().get_config(), "units": self.units, "projection": self.projection}


@keras.saving.register_keras_serializable("keras_moe")
class ProjectedLSTM(FreezableParts, keras.layers.RNN):
    """LSTM with recurrent projection: `units` cells, of which the world sees `projection` values.

    The paper's LSTM-2048-512 and the LSTMs of MoE-143M (appendix C). See `ProjectedLSTMCell`.

    Example:
    ```python
    keras_moe.layers.ProjectedLSTM(2048, 512, return_sequences=True)
    ```

    Args:
        units: U, the size of the memory.
        projection: P, the size of the output.
        **kwargs: Keyword arguments of `keras.layers.RNN`, as `return_sequences`.

    Call arguments:
        sequences: Float tensor [B, L, D].
        initial_state: List of h [B, P] and c [B, U], or `None` for zeros.
        mask: Boolean tensor [B, L] or `None`. A step with `False` leaves the state as it is.

    Returns:
        Float tensor [B, P], or [B, L, P] with `return_sequences`.

    Raises:
        ValueError: If a size is not an integer of at least 1.
    """

    def __init__(self, units, projection, **kwargs):
        dtype = kwargs.get("dtype")
        super().__init__(ProjectedLSTMCell(units, projection, dtype=dtype, name="cell"), **kwargs)
        self.freeze_parts()

    def call(self, sequences, initial_state=None, mask=None, training=False):
        sequences = as_input(self, sequences)
        return super().call(sequences, initial_state, as_mask(mask, sequences), training)

    def get_config(self):
        config = super().get_config()
        del config["cell"]  # Made from the two sizes.
        return {**config, "units": self.cell.units, "projection": self.cell.projection}
