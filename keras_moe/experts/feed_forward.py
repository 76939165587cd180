"""Banks of experts: N functions of the same shape with parameters of their own.

A bank is a Keras layer called with `rows` [M, D], sorted by expert, and `rows_per_expert` [N]; it
returns [M, output_dim]. Each expert computes its own rows and no others; rows behind the last
expert's belong to none and come back as zeros. Where every expert has C rows the bank is called
with `rows` [N, C, D] alone and returns [N, C, output_dim].

A bank called with `experts` [K] in place of `rows_per_expert` gets one example [1, D], and returns
what each of these experts makes of it, [K, output_dim].
"""

import contextlib
import functools
import inspect

import keras
from keras import ops

from keras_moe.arguments import check_size
from keras_moe.backend import (
    STATIC_SHAPES,
    activations,
    grouped_products,
    one_example,
    recomputation,
    vectorization,
)
from keras_moe.contract.inputs import as_input, as_numbers
from keras_moe.contract.recomputing import recomputing
from keras_moe.dispatch.blocks import block_by_block
from keras_moe.dispatch.products import in_blocks
from keras_moe.distribute.shards import over_shards, sharded_rows
from keras_moe.experts.initializers import PerExpert
from keras_moe.experts.int8 import Int8Kernels
from keras_moe.experts.regularizers import of_each_expert
from keras_moe.saving import CheckedVariables

# Gated linear units (Shazeer, 2020, "GLU Variants Improve Transformer", arXiv:2002.05202).
GATED_ACTIVATIONS = {
    "glu": "sigmoid",
    "bilinear": "linear",
    "reglu": "relu",
    "geglu": "gelu",
    "swiglu": "silu",
}


def is_bank(layer):
    """Whether a layer follows the protocol of banks, and isn't to be cloned into one."""
    return "rows_per_expert" in inspect.signature(layer.call).parameters


def takes_one_example(bank):
    """Whether a bank can be called with one example and `experts`."""
    return "experts" in inspect.signature(bank.call).parameters


def _product(rows, kernel):
    kernel = ops.cast(kernel, rows.dtype)  # It may be stored in another one.
    return vectorization.matmul_each(rows, kernel)


@keras.saving.register_keras_serializable("keras_moe")
class FeedForwardExperts(Int8Kernels, CheckedVariables, keras.layers.Layer):
    """Feed-forward experts (section 4 of the paper): hidden layers, then a linear output layer.

    Args:
        num_experts: N, the number of experts.
        hidden_units: Integer F, or a sequence of integers for several hidden layers.
        output_dim: Width of the output. Defaults to the width of the input.
        activation: Activation of the hidden layers, as in `keras.layers.Dense`; or `"swiglu"`,
            `"geglu"`, `"reglu"`, `"glu"` or `"bilinear"` for gated hidden layers: the first half
            of x·W goes through silu, gelu, relu, sigmoid or nothing and is multiplied by the other
            half. A Keras layer as activation must have no weights and no seed.
        use_bias: Whether each layer of an expert adds a bias.
        kernel_initializer: Initializer of each expert's matrices [D, F], …: every expert is drawn
            for itself, with the fans of its own matrix.
        bias_initializer: Initializer of each expert's biases.
        kernel_regularizer: Regularizer of each matrix of each expert: the loss is their sum. Of a
            gated hidden layer both matrices by themselves.
        bias_regularizer: Regularizer of each bias of each expert.
        recompute: Whether the backward pass computes the hidden activations again instead of
            storing them (appendix D): memory for time.
        static_shapes: Whether to compute in shapes that the shape of `rows` alone determines, as
            XLA needs them: in blocks of rows, each with a copy of its expert's kernels, at up to
            twice the operations.
        expert_parallel: Whether each replica of a `tf.distribute` strategy, or with JAX of a
            `keras.distribution`, holds a part of the experts. Inside a replica N stands for those.
        **kwargs: Keyword arguments of `keras.layers.Layer`.

    Attributes:
        kernels: List of variables [N, D, F], …, [N, F, output_dim], one per layer of an expert.
            Those of a gated hidden layer have 2·F columns.
        biases: List of variables [N, F], …, [N, output_dim]; empty without `use_bias`.
        scales: List of variables [N, 1, F], … by which products with kernels are divided; empty
            unless `quantize("int8")` has made them.

    Call arguments:
        rows: Float tensor [M, D], sorted by expert, or [N, C, D].
        rows_per_expert: int32 [N], their sum at most M; `None` with [N, C, D].
        experts: int64 [K], K known, experts for each of which `rows` is the same example [1, D].
        training: Whether there will be a backward pass; without, it can be had all the same, but
            computes the hidden activations again.

    Returns:
        Float tensor [M, output_dim], [N, C, output_dim] or [K, output_dim] in the compute dtype.

    Raises:
        ValueError: If `num_experts`, an entry of `hidden_units` or `output_dim` is not an integer
            of at least 1; in `build` if the replicas cannot hold as many experts each, or the
            activation is a layer with weights.
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
        recompute=False,
        static_shapes=False,
        expert_parallel=False,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_experts = check_size("num_experts", num_experts)
        self.hidden_units = _check_hidden_units(hidden_units)
        self.output_dim = None if output_dim is None else check_size("output_dim", output_dim)
        self._gated = activation if _is_gated(activation) else None
        self.activation = keras.activations.get(GATED_ACTIVATIONS.get(self._gated, activation))
        self.use_bias = use_bias
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.recompute = recompute
        self.static_shapes = static_shapes
        self.expert_parallel = expert_parallel
        self.supports_jit = static_shapes or STATIC_SHAPES

    def build(self, input_shape):
        self.input_spec = keras.InputSpec(min_ndim=2, max_ndim=3, axes={-1: input_shape[-1]})
        self._check_activation()
        with self._divided():
            self._add_weights(input_shape)
        if self.expert_parallel:
            for variable in self.weights:
                variable.regularizer = over_shards(variable.regularizer)

    def _divided(self):
        """Inside, variables [N, ...] are divided among the replicas if the experts are."""
        return sharded_rows(self.num_experts) if self.expert_parallel else contextlib.nullcontext()

    def quantize(self, *args, **kwargs):
        with self._divided():
            super().quantize(*args, **kwargs)

    def _check_activation(self):
        if not isinstance(self.activation, keras.layers.Layer):
            return
        self.activation.build((None, self.hidden_units[0]))
        if self.activation.variables:
            raise ValueError(
                "An activation must not have weights or a seed, which all experts would share. "
                "Give each its own: `SparseMoE(experts=keras.Sequential([...]))`. "
                f"Received: activation={self.activation}"
            )

    def _add_weights(self, input_shape):
        sizes = [input_shape[-1], *self.hidden_units, self.output_dim or input_shape[-1]]
        self.kernels, self.biases, self.scales = [], [], []
        for i, (width, units) in enumerate(zip(sizes, sizes[1:], strict=False)):
            halves = 2 if self._gated and i < len(self.hidden_units) else 1
            name, shape = f"kernel_{i}", (self.num_experts, width, halves * units)
            if self.quantization_mode is not None:
                self.add_int8_kernel(name, shape)
            else:
                self.kernels.append(
                    self.add_weight(
                        name=name,
                        shape=shape,
                        initializer=PerExpert(self.kernel_initializer, i, halves),
                        regularizer=of_each_expert(self.kernel_regularizer, halves),
                    )
                )
            if self.use_bias:
                self.biases.append(
                    self.add_weight(
                        name=f"bias_{i}",
                        shape=(self.num_experts, halves * units),
                        initializer=PerExpert(self.bias_initializer, i, halves),
                        regularizer=of_each_expert(self.bias_regularizer, halves),
                    )
                )
        for variable in (*self.kernels, *self.biases):
            variable.expert_rank = len(variable.shape) - 1  # By it optimizers know them.

    def call(self, rows, rows_per_expert=None, experts=None, training=None):
        rows = as_input(self, rows)
        rows_per_expert, experts = map(as_numbers, (rows_per_expert, experts))
        scales = [ops.squeeze(scale, axis=1) for scale in self.scales]
        banks = [ops.convert_to_tensor(kernel) for kernel in self.kernels]
        banks += [ops.cast(bank, self.compute_dtype) for bank in (*scales, *self.biases)]
        if experts is not None:
            function = functools.partial(self._feed_forward, product=one_example.row_times)
            return one_example.of_each(function, rows, experts, banks)
        if rows_per_expert is None or in_blocks(self.static_shapes):
            function = self._feed_forward
            if self.recompute:
                function = recomputation.recomputed(function)
            if rows_per_expert is None:
                return function(rows, *banks)
            return block_by_block(function, rows, rows_per_expert, banks)
        return grouped_products.apply(
            self._feed_forward,
            rows,
            rows_per_expert,
            banks,
            self.kernels[-1].shape[-1],
            training=training,
            recompute=self.recompute,
        )

    def rematerialized_call(self, layer_call, *args, **kwargs):
        """Under `keras.RematScope` as with `recompute`."""
        if super().rematerialized_call(layer_call, *args, **kwargs) is layer_call:
            return layer_call
        return recomputing(layer_call, [self])

    def _feed_forward(self, rows, *parameters, layout=None, product=_product):
        """One expert on its rows [M, D], G of them on theirs [G, M, D], or all on sorted rows."""
        of_rows = functools.partial(ops.expand_dims, axis=-2)
        if layout is not None:
            rows = grouped_products.arrange(rows, layout)
            product = functools.partial(grouped_products.multiply, layout=layout)
            of_rows = functools.partial(grouped_products.of_rows, layout=layout)
        number = len(self.kernels)
        kernels, others = parameters[:number], parameters[number:]
        scales, biases = others[: len(self.scales)], others[len(self.scales) :]
        for i, kernel in enumerate(kernels):
            if i > 0:
                rows = self._activate(rows)
            rows = product(rows, kernel)
            if scales:
                rows = ops.divide_no_nan(rows, of_rows(scales[i]))
            if biases:
                rows += of_rows(biases[i])
        return rows if layout is None else grouped_products.restore(rows, layout)

    def _activate(self, rows):
        activation = activations.lean(self.activation)
        if not self._gated:
            return activation(rows)
        through, gate = ops.split(rows, 2, axis=-1)
        return activation(through) * gate

    def compute_output_shape(self, rows_shape, rows_per_expert_shape=None):
        return (*rows_shape[:-1], self.output_dim or rows_shape[-1])

    def expert_axis(self, variable):
        return 0

    def copy_experts(self, bank, origins):
        """Makes each expert i a copy of expert origins[i] of another bank."""
        for new, old in zip(self.weights, bank.weights, strict=True):
            new.assign(ops.take(old, origins, axis=0))

    def get_config(self):
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "hidden_units": self.hidden_units,
            "output_dim": self.output_dim,
            "activation": self._gated or keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
            "recompute": self.recompute,
            "static_shapes": self.static_shapes,
            "expert_parallel": self.expert_parallel,
        }


def _check_hidden_units(hidden_units):
    sizes = hidden_units if isinstance(hidden_units, (list, tuple)) else [hidden_units]
    if not sizes:
        raise ValueError(f"`hidden_units` must have an entry. Received: {hidden_units!r}")
    return [check_size("hidden_units", size) for size in sizes]


def _is_gated(activation):
    return isinstance(activation, str) and activation in GATED_ACTIVATIONS
