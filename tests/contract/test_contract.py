"""What Keras promises of a layer, every layer of the package keeps. `contract.py` names them."""

import copy
import operator
import pickle

import keras
import numpy as np
import pytest
from contract import CONTRACTS, loss_of, public_layers
from gradients import with_gradients
from inputs import policies, rounded, sparse

every_layer = pytest.mark.parametrize("contract", CONTRACTS.values(), ids=CONTRACTS.keys())
DTYPES = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool"]
DTYPES += ["float16", "bfloat16", "float64"]
POLICIES = policies("float64", "float16", "bfloat16", "mixed_float16", "mixed_bfloat16")


def ones_and_zeros(contract):
    """Inputs that every dtype holds."""
    return [np.float32(x > 0) for x in contract.inputs()]


def assert_equal(received, expected, **tolerance):
    for one, other in zip(received, expected, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(np.float64(one), np.float64(other), **tolerance)


def gradients(contract, layer, inputs):
    """Gradients of that function by inputs that are floats and by weights."""
    weights = layer.trainable_weights
    loss = loss_of(contract, layer)
    _, by_inputs, by_weights = with_gradients(loss, inputs, weights, unconnected="zero")
    return [*by_inputs, *by_weights]


def test_every_public_layer_is_named():
    assert public_layers() == {contract.cls for contract in CONTRACTS.values()}


@every_layer
def test_inputs_of_any_dtype_are_computed_in_that_of_the_layer(contract):
    layer, x = contract.built(), ones_and_zeros(contract)
    expected = contract.outputs(layer, *x)
    for dtype in DTYPES:
        received = contract.outputs(layer, *[array.astype(dtype) for array in x])
        assert_equal(received, expected, rtol=1e-5, atol=1e-6)
    if keras.config.backend() == "jax":
        return  # Behind the cast it is the same program, which takes seconds to compile.
    *_, expected = gradients(contract, layer, x)
    *_, received = gradients(contract, layer, [np.int32(array) for array in x])
    np.testing.assert_allclose(received, expected, rtol=1e-5, atol=1e-6)


@every_layer
def test_inputs_are_converted_without_autocast_as_well(contract):
    x = ones_and_zeros(contract)
    expected = contract.outputs(contract.built(), *x)
    layer = contract.built(autocast=False)
    assert_equal(contract.outputs(layer, *map(np.float64, x)), expected, rtol=1e-5, atol=1e-6)


@every_layer
def test_sparse_inputs(contract):
    layer, x = contract.built(), ones_and_zeros(contract)
    expected = contract.outputs(layer, *x)
    for dtype in ("float32", "int64"):
        received = contract.outputs(layer, *[sparse(array.astype(dtype)) for array in x])
        assert_equal(received, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.covering
@pytest.mark.parametrize("policy", POLICIES)
@every_layer
def test_dtype_policies(contract, policy):
    if contract.only_float32:
        with pytest.raises(ValueError, match="float32"):
            contract.make(dtype=policy)
        return
    x, exact = ones_and_zeros(contract), contract.built()
    layer = contract.built(dtype=policy)
    # Equal weights choose equal experts: those that the lower precision holds.
    weights = [rounded(weight, layer.compute_dtype) for weight in exact.get_weights()]
    exact.set_weights(weights)
    layer.set_weights(weights)
    tolerance = {"float64": 1e-5, "float16": 2.0**-7, "bfloat16": 2.0**-4}[layer.compute_dtype]
    received = contract.outputs(layer, *x)
    for one, other in zip(received, contract.outputs(exact, *x), strict=True):
        assert one.dtype == layer.compute_dtype
        np.testing.assert_allclose(
            np.float64(one), np.float64(other), rtol=0, atol=tolerance * np.abs(other).max()
        )
    if policy != "mixed_bfloat16":
        return
    # This one has two dtypes that could be mistaken for each other.
    for gradient in gradients(contract, layer, x):
        assert np.isfinite(np.float64(gradient)).all()
    layer.autocast = False
    scale = max(np.abs(np.float64(y)).max() for y in received)
    assert_equal(contract.outputs(layer, *x), received, rtol=0, atol=tolerance * scale)


@every_layer
def test_symbolic_calls_tell_shapes_and_dtypes(contract):
    layer, x = contract.built(), contract.inputs()
    eager = contract.outputs(layer, *x)
    fixed = [keras.Input(batch_shape=shape) for shape in contract.shapes]
    ways = [fixed, contract.symbolic(), contract.symbolic("int32"), contract.symbolic(sparse=True)]
    for inputs in ways:
        new = contract.make()  # built by this call
        for one, other in zip(contract.outputs(new, *inputs), eager, strict=True):
            assert one.dtype == keras.backend.standardize_dtype(other.dtype)
            assert all(size in (None, n) for size, n in zip(one.shape, other.shape, strict=True))
            assert inputs is fixed or one.shape[-1] in (other.shape[-1], None)
        assert [w.shape for w in new.weights] == [w.shape for w in layer.weights]


@every_layer
def test_configurations_and_pickles_make_the_same_layer(contract):
    layer, x = contract.built(), contract.inputs()
    config = layer.get_config()
    again = contract.cls.from_config(config)
    again.build_from_config(layer.get_build_config())
    assert again.get_config() == config
    again.set_weights(layer.get_weights())
    for copied in (again, pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert copied.get_config() == config
        assert_equal(contract.outputs(copied, *x), contract.outputs(layer, *x))


def state(layer):
    """What is to be trained: of each part, in any depth, and of each variable."""
    parts = layer._flatten_layers()
    parts = [p.trainable for p in parts if not isinstance(p, keras.layers.InputLayer)]
    return parts, [weight.trainable for weight in layer.weights]


def part_of(layer, path):
    for name in path.split("."):
        layer = layer[int(name)] if name.isdigit() else operator.attrgetter(name)(layer)
    return layer


@every_layer
def test_frozen_stays_frozen(contract, tmp_path):
    fresh = contract.built()
    everything, shapes = state(fresh), fresh.get_build_config()

    def built(layer):
        layer.build_from_config(shapes)
        return layer

    assert not any(map(any, state(built(contract.make(trainable=False)))))

    def freeze(layer):
        layer.trainable = False

    def freeze_part(path):
        return lambda layer: freeze(part_of(layer, path))

    def freeze_all_but_one(layer):
        layer.trainable = False
        part_of(layer, contract.parts[-1]).trainable = True

    changes = [freeze_all_but_one, *map(freeze_part, contract.parts)] if contract.parts else []
    for change in [*changes, freeze]:
        before, after = contract.make(), built(contract.make())
        change(before)
        change(after)
        wanted = state(after)
        assert wanted != everything
        assert state(built(before)) == wanted
        copied = built(contract.cls.from_config(after.get_config()))
        assert copied.get_config() == after.get_config()
        assert state(copied) == wanted
        # What never is trained, as the statistics of a normalization, stays as it is.
        copied.trainable = not copied.trainable
        copied.trainable = True
        assert state(copied) == everything
    assert not any(map(any, wanted))

    assert state(pickle.loads(pickle.dumps(before))) == wanted
    assert state(copy.deepcopy(before)) == wanted
    change = changes[-1] if changes else freeze
    after = built(contract.make())
    change(after)
    wanted = state(after)
    inputs = contract.symbolic()
    model = keras.Model(inputs, contract.outputs(after, *inputs))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for copied in (keras.models.clone_model(model), loaded):
        (found,) = [part for part in copied.layers if type(part) is contract.cls]
        assert state(found) == wanted
        assert len(copied.trainable_weights) == sum(wanted[1])


@pytest.mark.tensorflow("JAX traces a function for each shape, which it knows")
@every_layer
def test_unknown_shapes(contract):
    import tensorflow as tf

    layer, x = contract.built(), [tf.constant(array) for array in contract.inputs()]
    masks = {
        name: tf.constant(np.random.default_rng(i).random(contract.shapes[i][:-1]) < 0.7)
        for name, i in contract.masks.items()
    }
    of_x = [tf.TensorSpec([None] * len(shape)) for shape in contract.shapes]
    # Of masks not even the rank is known; of inputs it has to be, as for any layer of Keras.
    for given in [{}, masks] if masks else [{}]:
        specs = {name: tf.TensorSpec(None, "bool") for name in given}
        call = tf.function(
            lambda x, masks: contract.outputs(layer, *x, **masks),
            input_signature=[of_x, specs],
            autograph=False,
        )
        expected = contract.outputs(layer, *x, **given)
        assert_equal(call(x, given), expected, rtol=1e-5, atol=1e-6)
        for narrower in set(range(len(x))) - set(contract.any_width):
            wrong = [tensor[..., i == narrower :] for i, tensor in enumerate(x)]
            with pytest.raises(tf.errors.InvalidArgumentError):
                call(wrong, given)
