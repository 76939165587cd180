"""`model.quantize` beside and inside a mixture."""

import re

import keras
import numpy as np
import pytest
from compiled_once import at_once
from helpers import EVERY_LAYER, WIDTH, with_random_weights
from keras.ops import convert_to_numpy as numpy

from keras_moe import SparseMoE


def quantized(layer):
    """A model of two Dense layers around a layer, quantized; what the layer gave and gives."""
    model = keras.Sequential([keras.layers.Dense(WIDTH), layer, keras.layers.Dense(3)])
    x = np.random.default_rng(0).normal(size=(16, WIDTH)).astype("float32")
    model.build(x.shape)
    before = numpy(at_once(lambda: layer(x)))
    # Keras warns of every layer that stays as it is, and by the way of what setup.cfg names.
    expected = "does not have a `quantize` method|__array__ implementation"
    with pytest.warns((UserWarning, DeprecationWarning), match=expected):
        model.quantize("int8")
    assert {model.layers[0].quantization_mode, model.layers[2].quantization_mode} == {"int8"}
    return model, x, before, numpy(at_once(lambda: layer(x)))


@pytest.mark.parametrize("name", ["noisy_top_k", "strictly_balanced", "hierarchical_capacity"])
def test_feed_forward_experts_are_quantized_and_the_gating_is_not(name):
    layer = with_random_weights(EVERY_LAYER[name]())
    _, _, before, after = quantized(layer)
    # In int8 each weight is off by 1/254 of the largest one of its column at most.
    np.testing.assert_allclose(after, before, atol=0.03 * np.abs(before).max())
    assert np.any(after != before)
    assert {kernel.dtype for kernel in layer.experts.kernels} == {"int8"}
    assert {weight.dtype for weight in layer.gating.trainable_weights} == {"float32"}


@pytest.mark.covering
@pytest.mark.parametrize("shared", [0, 1])
@pytest.mark.parametrize("nested", [False, True])
def test_dense_experts_are_quantized_saved_and_loaded(nested, shared, tmp_path):
    expert = keras.layers.Dense(WIDTH, "tanh", kernel_initializer=keras.initializers.HeNormal(1))
    if nested:
        expert = keras.Sequential([keras.layers.Dense(8, "tanh"), expert])
    layer = SparseMoE(4, experts=expert, k=2, num_shared_experts=shared)
    template = layer.get_config()["experts"]["config"]["layer"]
    model, x, before, after = quantized(layer)
    # In int8 each of the up to two products is off by 1/127 of the largest number or so.
    np.testing.assert_allclose(after, before, atol=0.05 * np.abs(before).max())
    assert np.any(after != before)
    banks = [layer.experts, *([layer.shared_experts] if shared else [])]
    experts = [expert for bank in banks for expert in bank.layers]
    dense = [part for expert in experts for part in getattr(expert, "layers", [expert])]
    assert {part.quantization_mode for part in dense} == {"int8"}
    assert all(part.kernel.dtype == "int8" for part in dense)

    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    received, expected = (at_once(lambda model=model: model(x)) for model in (loaded, model))
    np.testing.assert_array_equal(received, expected)
    # Nothing but the precision is another: the seeds are those that every clone is made from.
    config = loaded.layers[1].get_config()["experts"]["config"]["layer"]
    assert config["config"]["name"] == template["config"]["name"]
    assert "QuantizedDTypePolicy" in str(config) and "QuantizedDTypePolicy" not in str(template)
    seeds = [re.findall(r"'seed': (\d+)", str(made)) for made in (config, template)]
    assert [found.count("1") for found in seeds] == [1, 1]
