"""What of every public layer is compiled: a step of `fit`, and second derivatives."""

import keras
import numpy as np
import pytest
from combinations import few_in_jax
from contract import CONTRACTS, floats, loss_of
from gradients import curvature
from keras import ops
from keras.ops import convert_to_numpy as numpy

# One of each way.
FEW = {"capacity", "shared", "layer_experts", "hierarchical", "hierarchical_balanced"}
FEW |= {"FeedForwardExperts", "AttentionLSTM, product", "ProjectedLSTM", "SampledSoftmax"}
compiled = pytest.mark.parametrize("contract", few_in_jax(CONTRACTS, FEW))
# Of those that hold the same products.
TWICE = FEW - {"hierarchical_balanced", "shared", "ProjectedLSTM"}


class OneBatch(keras.utils.PyDataset):
    def __init__(self, inputs):
        super().__init__()
        self.inputs = inputs

    def __len__(self):
        return 1

    def __getitem__(self, index):
        x = tuple(self.inputs) if len(self.inputs) > 1 else self.inputs[0]
        return x, self.inputs[0][:, :1]


def of_unknown_shape(inputs):
    """A batch for `fit`, with a target, of whose shape TensorFlow knows nothing but the rank."""
    if keras.config.backend() == "jax":
        return OneBatch(inputs)
    import tensorflow as tf

    def unknown(*tensors):
        x = []
        for tensor in tensors:
            x.append(tf.numpy_function(lambda value: value, [tensor], tensor.dtype))
            x[-1].set_shape([None] * len(tensor.shape))
        return (tuple(x) if len(x) > 1 else x[0]), x[0][:, :1]

    return tf.data.Dataset.from_tensors(tuple(inputs)).map(unknown)


@compiled
def test_fit_takes_a_step_on_data_of_unknown_shape(contract):
    layer = contract.built()
    inputs = contract.symbolic()
    first, *_ = floats(contract.outputs(layer, *inputs))
    model = keras.Model(inputs, first)
    model.compile("sgd", lambda y, predicted: ops.mean(ops.sin(predicted)))

    data = of_unknown_shape(contract.inputs())
    if contract.counts_rows and keras.config.backend() == "jax":
        with pytest.raises(ValueError, match="Set `capacity_factor`"):
            model.fit(data, verbose=0)
        return
    before = [numpy(weight) for weight in layer.trainable_weights]
    history = model.fit(data, verbose=0, shuffle=False).history
    assert np.isfinite(history["loss"]).all()
    after = [numpy(weight) for weight in layer.trainable_weights]
    assert all(np.isfinite(weight).all() for weight in after)
    assert any((one != other).any() for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("contract", few_in_jax(CONTRACTS, TWICE))
def test_second_derivatives(contract):
    in_training = [contract.twice_in_training]
    if in_training == [True] and keras.config.backend() != "jax":  # Which compiles long.
        in_training.append(False)
    for training in in_training:
        assert_twice_differentiable(contract, training)


def assert_twice_differentiable(contract, training):
    layer, x = contract.built(), contract.inputs()
    rng = np.random.default_rng(3)
    weights = layer.trainable_weights
    direction = [np.float32(rng.normal(size=source.shape)) for source in (*x, *weights)]
    loss = loss_of(contract, layer, training)
    for received, expected in zip(*curvature(loss, x, weights, direction), strict=True):
        tolerance = 2e-2 * max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(received, expected, rtol=0, atol=tolerance)
