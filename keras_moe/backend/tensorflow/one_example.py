"""A single example and its experts: nothing is sorted."""

import tensorflow as tf

from keras_moe.backend.tensorflow.devices import by_device


def of_each(function, x, experts, banks):
    """Applies several experts' functions to one example: nothing is sorted, padded or copied.

    On GPUs the parameters are copied, and all experts computed at once.

    Args:
        function: Called with `x` [1, D] and an expert's parameters [...] of each bank, or with
            [1, 1, D] and those of all K experts [K, ...].
        x: Float tensor [1, D].
        experts: Integer tensor [K], K known.
        banks: List of tensors or variables [N, ...], the experts' parameters.

    Returns:
        Float tensor [K, width].
    """

    @tf.custom_gradient
    def call(x, *banks):
        def one_by_one():
            return [[bank[i] for bank in banks] for i in tf.unstack(experts)]

        def all_at_once():
            return [[tf.gather(bank, experts) for bank in banks]]

        def results(x, parameters, stacked=False):
            y = [function(x[None] if stacked else x, *expert) for expert in parameters]
            return y[0][:, 0] if stacked else tf.concat(y, axis=0)

        def gradients(upstream, parameters, stacked=False):
            with tf.GradientTape() as tape:
                tape.watch([x, parameters])
                y = results(x, parameters, stacked)
            of_x, of_experts = tape.gradient(
                y, [x, parameters], upstream, unconnected_gradients="zero"
            )
            of_experts = of_experts[0] if stacked else map(tf.stack, zip(*of_experts, strict=True))
            of_banks = [
                tf.tensor_scatter_nd_add(tf.zeros_like(bank), experts[:, None], theirs)
                for bank, theirs in zip(banks, of_experts, strict=True)
            ]
            return of_x, *of_banks

        def gradient(upstream):
            return by_device(
                lambda: gradients(upstream, one_by_one()),
                lambda: gradients(upstream, all_at_once(), stacked=True),
            )

        y = by_device(
            lambda: results(x, one_by_one()),
            lambda: results(x, all_at_once(), stacked=True),
        )
        return y, gradient

    return call(x, *map(tf.convert_to_tensor, banks))


def row_times(row, kernel):
    """The product of a row [1, D] and a matrix [D, F], from which it may differ in dtype.

    `MatMul` of a single row takes up to twice as long as this (TensorFlow 2.21, on CPUs), which,
    with nothing marked as sparse, is Eigen's plain product.
    """
    kernel = tf.cast(kernel, row.dtype)
    if row.dtype != tf.float32:
        return tf.matmul(row, kernel)
    return by_device(
        lambda: tf.raw_ops.SparseMatMul(a=row, b=kernel), lambda: tf.matmul(row, kernel)
    )
