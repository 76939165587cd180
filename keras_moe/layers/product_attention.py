"""The attention of the paper's translation models (equation 22), and GNMT's (equation 21)."""

from typing import Any, NamedTuple

import keras
from keras import ops

from keras_moe.arguments import check_size
from keras_moe.contract.freezing import FreezableParts
from keras_moe.contract.inputs import as_input, as_mask


class Memory(NamedTuple):
    """What a query may attend to, prepared once for many queries.

    Attributes:
        value: Float tensor [B, S, V], zeros where the mask is `False`.
        key: Float tensor [B, S, H], the keys times U.
        mask: Boolean tensor [B, S], or `None` for all `True`.
    """

    value: Any
    key: Any
    mask: Any


@keras.saving.register_keras_serializable("keras_moe")
class ProductAttention(FreezableParts, keras.layers.Layer):
    """Attention by a product of hidden units, instead of their sum (equation 22).

    A(x_i, y_j) = Σ_d v_d · tanh((x_i·U)_d) · tanh((y_j·W)_d), where x_i is a source step (a key)
    and y_j a target step (a query). All pairs take one multiplication of matrices, whereas the tanh
    of a sum (equation 21, `AdditiveAttention`) would need a tensor [B, T, S, H]. The weights of the
    values are softmax over i of A(x_i, y_j).

    It is called as `keras.layers.AdditiveAttention` is:

    ```python
    attention = keras_moe.layers.ProductAttention(512)
    context, weights = attention(
        [query, value], mask=[None, source != 0], return_attention_scores=True
    )
    ```

    Args:
        units: H, the number of hidden units.
        **kwargs: Keyword arguments of `keras.layers.Layer`.

    Attributes:
        query_kernel: Variable W [D_query, H].
        key_kernel: Variable U [D_key, H].
        scale: Variable v [H].

    Call arguments:
        inputs: List of the query [B, T, D_query], the value [B, S, V], and the key [B, S, D_key],
            which by default is the value.
        mask: List of the query's mask, boolean [B, T], and the value's, boolean [B, S]; each may
            be `None`. Values with `False` have weight 0 whatever they hold, and queries with
            `False` get zeros.
        return_attention_scores: Whether to return the weights, too.

    Returns:
        Float tensor [B, T, V], the weighted sum of the values: zeros where all values are masked.
        With `return_attention_scores` also the weights, [B, T, S].

    Raises:
        ValueError: If `units` is not an integer of at least 1, or `inputs` not a list of two or
            three tensors.
    """

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = check_size("units", units)
        self.supports_masking = True

    def build(self, input_shape):
        query, *_, key = _checked(input_shape)
        self.query_kernel = self.add_weight(name="query_kernel", shape=(query[-1], self.units))
        self.key_kernel = self.add_weight(name="key_kernel", shape=(key[-1], self.units))
        self.build_score()

    def build_score(self):
        """Adds the weights of `score`."""
        self.scale = self.add_weight(name="scale", shape=(self.units,))

    def call(self, inputs, mask=None, return_attention_scores=False):
        query, value, *_ = inputs = [as_input(self, x) for x in _checked(inputs)]
        masks = (None, None) if mask is None else mask[:2]
        query_mask, value_mask = map(as_mask, masks, (query, value))
        context, weights = self.attend(query, self.remember(value, value_mask, inputs[-1]))
        if query_mask is not None:
            context = ops.where(query_mask[..., None], context, ops.zeros_like(context))
        return (context, weights) if return_attention_scores else context

    def remember(self, value, mask=None, key=None):
        """Does what doesn't depend on the query.

        Args:
            value: Float tensor [B, S, V].
            mask: Boolean tensor [B, S] or `None`.
            key: Float tensor [B, S, D_key]. Default: the value.

        Returns:
            A `Memory`.
        """
        key = value if key is None else key
        if mask is not None:
            # Not by a weight of 0 alone: 0·NaN is NaN.
            value = ops.where(mask[..., None], value, ops.zeros_like(value))
            key = ops.where(mask[..., None], key, ops.zeros_like(key))
        return Memory(value, ops.matmul(key, self.key_kernel), mask)

    def attend(self, query, memory):
        """Looks up queries [B, T, D_query]: returns contexts [B, T, V] and weights [B, T, S]."""
        return self.weigh(ops.matmul(query, self.query_kernel), memory)

    def weigh(self, query, memory):
        """The same for queries [B, T, H], already multiplied by W."""
        scores = self.score(query, memory.key)
        # The softmax of a long source needs the precision of float32.
        scores = ops.cast(scores, keras.backend.result_type(scores.dtype, "float32"))
        if memory.mask is None:
            weights = _softmax(scores)
        else:
            mask = memory.mask[:, None, :]
            weights = ops.where(mask, _softmax(ops.where(mask, scores, -1e9)), 0.0)
        weights = ops.cast(weights, self.compute_dtype)
        return ops.matmul(weights, memory.value), weights

    def score(self, query, key):
        """A(x, y) of queries [B, T, H] and keys [B, S, H], already multiplied: [B, T, S]."""
        key = ops.swapaxes(ops.tanh(key), -1, -2)
        return ops.matmul(ops.tanh(query) * self.scale, key)

    def compute_mask(self, inputs, mask=None):
        return None if mask is None else mask[0]

    def compute_output_shape(self, input_shape):
        return (*input_shape[0][:-1], input_shape[1][-1])

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable("keras_moe")
class AdditiveAttention(ProductAttention):
    """Attention by the tanh of a sum, as in GNMT (equation 21).

    A(x_i, y_j) = Σ_d v_d · tanh((x_i·U)_d + (y_j·W)_d): `keras.layers.AdditiveAttention` behind the
    projections U and W. Arguments, call and results are those of `ProductAttention`, but for
    `attention`, the layer of Keras, which has v in place of `scale`.
    """

    def __init__(self, units, **kwargs):
        super().__init__(units, **kwargs)
        self.attention = keras.layers.AdditiveAttention(dtype=self.dtype_policy)
        self.freeze_parts()

    def build_score(self):
        self.attention.build([(None, None, self.units)] * 2)

    def score(self, query, key):
        # Not by a call of `attention`, whose mask Keras 3.10 takes in another form than later ones.
        sums = ops.expand_dims(query, axis=-2) + ops.expand_dims(key, axis=-3)
        return ops.sum(self.attention.scale * ops.tanh(sums), axis=-1)


def _checked(inputs):
    """Returns a list of two or three tensors or shapes, or raises ValueError."""
    several = isinstance(inputs, (list, tuple)) and 2 <= len(inputs) <= 3
    if not several or isinstance(inputs[-1], int):  # The shape of one tensor is a tuple, too.
        raise ValueError(
            "Attention is called with a list, [query, value] or [query, value, key]. "
            f"Received: {inputs!r}"
        )
    return inputs


def _softmax(scores):
    """Not `ops.softmax`, which warns of a source of one step."""
    return ops.exp(ops.log_softmax(scores))
