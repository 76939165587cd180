"""Banks of experts: N functions of the same shape with parameters of their own.

A bank is a Keras layer called with `rows` [M, D], sorted by expert, and `rows_per_expert` [N]; it
returns [M, output_dim]. Each expert computes its own rows and no others; rows behind the last
expert's belong to none and come back as zeros.
"""

import keras
import numpy as np
from keras import ops

from keras_moe import dispatch
from keras_moe.arguments import check_size
from keras_moe.saving import CheckedVariables


@keras.saving.register_keras_serializable("keras_moe")
class FeedForwardExperts(CheckedVariables, keras.layers.Layer):
    """Feed-forward experts (section 4 of the paper): hidden layers, then a linear output layer.

    Args:
        num_experts: N, the number of experts.
        hidden_units: Integer F, or a sequence of integers for several hidden layers.
        output_dim: Width of the output. Defaults to the width of the input.
        activation: Activation of the hidden layers, as in `keras.layers.Dense`.
        use_bias: Whether each layer of an expert adds a bias.
        kernel_initializer: Initializer of each expert's matrices [D, F], …: every expert is drawn
            for itself, with the fans of its own matrix.
        bias_initializer: Initializer of each expert's biases.
        kernel_regularizer: Regularizer of the kernels.
        bias_regularizer: Regularizer of the biases.
        **kwargs: Keyword arguments of `keras.layers.Layer`.

    Attributes:
        kernels: List of variables [N, D, F], …, [N, F, output_dim], one per layer of an expert.
        biases: List of variables [N, F], …, [N, output_dim]; empty without `use_bias`.

    Call arguments:
        rows: Float tensor [M, D], sorted by expert.
        rows_per_expert: int32 [N], their sum at most M.

    Returns:
        Float tensor [M, output_dim] in the compute dtype.

    Raises:
        ValueError: If `num_experts`, an entry of `hidden_units` or `output_dim` is not an integer
            of at least 1.
    """

    def __init__(
        self,
        num_experts,
        hidden_units,
        output_dim=None,
        activation="relu",
        use_bias=False,
        kernel_initializer="glorot_uniform",
        bias_initializer="zeros",
        kernel_regularizer=None,
        bias_regularizer=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_experts = check_size("num_experts", num_experts)
        self.hidden_units = _check_hidden_units(hidden_units)
        self.output_dim = None if output_dim is None else check_size("output_dim", output_dim)
        self.activation = keras.activations.get(activation)
        self.use_bias = use_bias
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)

    def build(self, input_shape):
        sizes = [input_shape[-1], *self.hidden_units, self.output_dim or input_shape[-1]]
        self.kernels = [
            self.add_weight(
                name=f"kernel_{i}",
                shape=(self.num_experts, *shape),
                initializer=_PerExpert(self.kernel_initializer, layer=i),
                regularizer=self.kernel_regularizer,
            )
            for i, shape in enumerate(zip(sizes, sizes[1:], strict=False))
        ]
        self.biases = [
            self.add_weight(
                name=f"bias_{i}",
                shape=(self.num_experts, units),
                initializer=_PerExpert(self.bias_initializer, layer=i),
                regularizer=self.bias_regularizer,
            )
            for i, units in enumerate(sizes[1:] if self.use_bias else [])
        ]

    def call(self, rows, rows_per_expert):
        *pieces, rest = dispatch.split(rows, rows_per_expert)
        for i, bank in enumerate(self.kernels):
            if i > 0:
                pieces = [self.activation(piece) for piece in pieces]
            kernels = ops.unstack(bank)
            pieces = [ops.matmul(p, kernel) for p, kernel in zip(pieces, kernels, strict=True)]
            if self.use_bias:
                biases = ops.unstack(self.biases[i])
                pieces = [p + bias for p, bias in zip(pieces, biases, strict=True)]
        return dispatch.join(pieces, rest)

    def compute_output_shape(self, rows_shape, rows_per_expert_shape=None):
        return (*rows_shape[:-1], self.output_dim or rows_shape[-1])

    def expert_axis(self, variable):
        return 0

    def expert_weights(self, i):
        """The weights of expert i alone: a list of NumPy arrays, kernels first, then biases."""
        return [ops.convert_to_numpy(weight[i]) for weight in self.weights]

    def assign_expert(self, i, weights):
        """Gives expert i other weights, in the form that `expert_weights` returns."""
        for weight, value in zip(self.weights, weights, strict=True):
            bank = np.array(ops.convert_to_numpy(weight))
            bank[i] = value
            weight.assign(bank)

    def get_config(self):
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "hidden_units": self.hidden_units,
            "output_dim": self.output_dim,
            "activation": keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
        }


def _check_hidden_units(hidden_units):
    sizes = hidden_units if isinstance(hidden_units, (list, tuple)) else [hidden_units]
    if not sizes:
        raise ValueError(f"`hidden_units` must have an entry. Received: {hidden_units!r}")
    return [check_size("hidden_units", size) for size in sizes]


class _PerExpert(keras.initializers.Initializer):
    """Draws each expert's part of a bank [N, …] by itself.

    An initializer applied to the bank as a whole would take N for the receptive field of a
    convolution and draw all weights too small by √N.
    """

    def __init__(self, initializer, layer):
        self.initializer = initializer
        self.layer = layer

    def __call__(self, shape, dtype=None):
        num_experts, *expert_shape = shape
        seed = getattr(self.initializer, "seed", None)
        if not isinstance(seed, int):  # Nothing random, or a generator, new at every draw.
            draws = [self.initializer] * num_experts
        else:
            # Keras repeats the values of a seed: each layer of each expert needs its own.
            seeds = np.random.default_rng([abs(seed), self.layer]).integers(2**31, size=num_experts)
            config = self.initializer.get_config()
            draws = [type(self.initializer).from_config({**config, "seed": int(s)}) for s in seeds]
        return ops.stack([draw(tuple(expert_shape), dtype=dtype) for draw in draws])
