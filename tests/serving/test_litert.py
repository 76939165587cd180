"""Why a mixture can't be exported to LiteRT: saved_models/README.md says so as long as it holds."""

import warnings

import numpy as np
import tensorflow as tf


def test_the_converter_loses_the_relu_behind_a_matrix_chosen_at_run_time():
    kernels = tf.constant(-np.ones((2, 3, 4), "float32"))
    specification = [tf.TensorSpec([1, 3]), tf.TensorSpec([], tf.int32)]

    @tf.function(input_signature=specification, autograph=False)
    def expert(x, i):
        return tf.nn.relu(x @ kernels[i])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other packages for the same
        converter = tf.lite.TFLiteConverter.from_concrete_functions(
            [expert.get_concrete_function()]
        )
        interpreter = tf.lite.Interpreter(model_content=converter.convert())
    interpreter.allocate_tensors()
    for details in interpreter.get_input_details():
        value = np.ones((1, 3), "float32") if len(details["shape"]) else np.array(1, "int32")
        interpreter.set_tensor(details["index"], value)
    interpreter.invoke()
    (details,) = interpreter.get_output_details()
    # 1·(-1), three times, is below 0. Were it 0, mixtures might be exported: see the README.
    np.testing.assert_array_equal(interpreter.get_tensor(details["index"]), np.full((1, 4), -3.0))
    np.testing.assert_array_equal(expert(tf.ones((1, 3)), 1), np.zeros((1, 4)))
