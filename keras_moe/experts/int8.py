"""Experts in int8, after training: `model.quantize("int8")`, as for Keras' own layers.

Of the weights alone: each expert's kernel [D, F] becomes integers from -127 to 127 and a scale for
each of its F outputs, of which the largest weight has 127. Activations stay as they are.
"""

import keras
import numpy as np
from keras import ops

from keras_moe.backend import devices, gradients


class Int8Kernels:
    """Turns the kernels of a bank into int8.

    A class that a bank inherits from before `keras.layers.Layer`. The bank has a list `kernels` of
    variables [N, D, F], and calls `add_int8_kernel` when it is built with a quantized policy, as it
    is by loading. What it computes from rows and a kernel in int8 it divides by the scale.

    Attributes:
        scales: List of float32 variables [N, 1, F], one per kernel; empty before.
    """

    def quantize(self, mode=None, type_check=True, config=None):
        """Quantizes the kernels, each output of each expert for itself.

        Args:
            mode: `"int8"`.
            type_check: Without effect.
            config: `keras.quantizers.Int8QuantizationConfig` without a weight quantizer of its own.

        Raises:
            NotImplementedError: For any other mode or weight quantizer; `model.quantize` then
                leaves the layer as it is, and warns.
        """
        quantizer = getattr(config, "weight_quantizer", None)
        if mode != "int8" or quantizer is not None:
            raise NotImplementedError(
                f"{type(self).__name__} can only be quantized to int8, by a scale for each output "
                'of each expert; the layer stays as it is. Use `quantize("int8")`. Received: '
                f"layer {self.name!r}, mode={mode!r}, weight_quantizer={quantizer!r}"
            )
        kernels, self.kernels = list(self.kernels), []
        while kernels:
            kernel = kernels.pop(0)
            values, scales = _quantized(ops.convert_to_numpy(kernel))
            name, shape = kernel.name, kernel.shape
            # Keras forgets a variable when an attribute that holds it is deleted.
            self._replaced = kernel
            del self._replaced, kernel
            self.add_int8_kernel(name, shape)
            self.kernels[-1].assign(values)
            self.scales[-1].assign(scales)
        self.dtype_policy = keras.dtype_policies.QuantizedDTypePolicy(mode, self.dtype_policy.name)

    def add_int8_kernel(self, name, shape):
        """Adds a kernel and its scales to the lists."""
        fixed = {"trainable": False, "initializer": "zeros"}
        self.kernels.append(self.add_weight(name=name, shape=shape, dtype="int8", **fixed))
        scales = (shape[0], 1, shape[2])
        self.scales.append(
            self.add_weight(name=f"{name}_scale", shape=scales, dtype="float32", **fixed)
        )
        self._is_quantized = True  # By that name Keras' own layers say so.

    def quantized_call(self, *args, training=None, **kwargs):
        y = self.call(*args, training=training, **kwargs)
        return _refuse_gradient(y) if training else y


def _quantized(kernels):
    """int8 [N, D, F] and float32 [N, 1, F]; one expert after the other, which saves memory."""
    values = np.empty(kernels.shape, "int8")
    scales = np.empty((kernels.shape[0], 1, kernels.shape[2]), "float32")
    for i, kernel in enumerate(kernels):
        values[i], scales[i] = keras.quantizers.abs_max_quantize(
            kernel.astype("float32"), axis=0, to_numpy=True
        )
    return values, scales


def _refuse_gradient(y):
    return gradients.with_gradient(devices.same, _refusal, [y])


def _refusal(upstream, y):
    raise ValueError(
        "Experts in int8 are there to be used, not to be trained: no gradient passes them. "
        "Train before `quantize`, or load the weights from before into a new model."
    )
