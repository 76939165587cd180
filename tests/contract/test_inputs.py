"""What a mixture is given: lists, sparse tensors, masks without a shape, data of unknown width."""

import keras
import numpy as np
import pytest
from combinations import few_in_jax
from contract import CONTRACTS
from helpers import EVERY_LAYER, WIDTH, assign_random_weights, every_layer, with_random_weights
from inputs import sparse
from keras import ops

import keras_moe
from keras_moe import FeedForwardExperts, HierarchicalMoE, SparseMoE

COUNTS = np.random.default_rng(0).integers(0, 3, size=(7, WIDTH))


@every_layer
def test_routes_of_lists_and_integers_are_those_of_floats(make):
    layer = with_random_weights(make())
    expected = layer.route(COUNTS.astype("float32"))
    ways = [COUNTS, COUNTS.astype("uint8"), COUNTS.tolist(), sparse(COUNTS)]
    for x in [*ways, np.float64(COUNTS), COUNTS.astype("bfloat16")]:
        for one, other in zip(layer.route(x), expected, strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_allclose(one, other, rtol=1e-6)
    booleans = layer.route(COUNTS > 0)
    np.testing.assert_allclose(booleans.gates, layer.route(np.float32(COUNTS > 0)).gates)


def test_numbers_of_rows_may_be_of_any_integers():
    bank = FeedForwardExperts(3, 4)
    rows = np.float32(COUNTS)
    expected = bank(rows, rows_per_expert=ops.convert_to_tensor([3, 0, 4], "int32"))
    for numbers in ([3, 0, 4], np.array([3, 0, 4]), ops.convert_to_tensor(np.array([3, 0, 4]))):
        np.testing.assert_array_equal(bank(rows, rows_per_expert=numbers), expected)
    one = bank(rows[:1], experts=[2, 0])
    np.testing.assert_array_equal(one, bank(rows[:1], experts=np.array([2, 0])))


@pytest.mark.tensorflow("JAX has no ragged tensors")
@pytest.mark.parametrize(
    "name", ["NoisyTopKGating", "FeedForwardExperts", "LayerExperts", "AttentionLSTM, product"]
)
def test_ragged_input_is_refused_by_parts_as_well(name):
    contract = CONTRACTS[name]
    layer = contract.built()
    _, *others = contract.inputs()
    message = f"{contract.cls.__name__} takes no ragged input.*x.to_tensor"
    with pytest.raises(ValueError, match=message):
        contract.call(layer, ragged(contract.shapes[0]), *others)


def ragged(shape):
    import tensorflow as tf

    return tf.RaggedTensor.from_tensor(tf.ones(shape), ragged_rank=len(shape) - 2 or 1)


@pytest.mark.tensorflow("under JAX there are no shapes that nobody knows")
def test_masks_of_another_length_are_refused_in_graphs():
    import tensorflow as tf

    layer = with_random_weights(SparseMoE(5, 4, k=2))
    call = tf.function(
        lambda x, mask: layer(x, mask=mask),
        input_signature=[tf.TensorSpec([None, WIDTH]), tf.TensorSpec(None, "bool")],
    )
    x = np.float32(COUNTS)
    for mask in ([True] * 8, [False] * 6, [[True] * 7]):
        with pytest.raises(tf.errors.InvalidArgumentError):
            call(x, mask)
    mask = [True, False, True, True, False, True, True]
    np.testing.assert_array_equal(np.any(call(x, mask), axis=1), mask)


# Bags of words, as a mixture in the first place gets them.
BAGS = ("noisy_top_k", "capacity", "hierarchical")


@pytest.mark.parametrize(
    "make", few_in_jax({name: EVERY_LAYER[name] for name in BAGS}, ["noisy_top_k"])
)
def test_models_of_sparse_inputs(make, tmp_path):
    def model(sparse):
        x = keras.Input((WIDTH,), sparse=sparse, name="words")
        return keras.Model(x, keras.layers.Dense(1)(make(seed=0)(x)))

    of_sparse, dense = model(True), model(False)
    assign_random_weights(dense, np.random.default_rng(0), scale=0.3)
    of_sparse.set_weights(dense.get_weights())
    rows, targets = np.float32(COUNTS), np.float32(COUNTS.sum(axis=1, keepdims=True))
    words = sparse(rows)
    for one, x in ((of_sparse, words), (dense, rows)):
        one.compile(keras.optimizers.SGD(0.01), "mse", jit_compile=False)
        for _ in range(2):
            one.train_on_batch(x, targets)
    for one, other in zip(of_sparse.get_weights(), dense.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    expected = dense.predict(rows, verbose=0)
    received = of_sparse.predict_on_batch(words)
    np.testing.assert_allclose(received, expected, rtol=1e-4, atol=1e-5)

    of_sparse.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded(words), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.tensorflow("tf.data and servers are TensorFlow's")
def test_data_of_sparse_rows_and_servers(tmp_path):
    import tensorflow as tf

    x = keras.Input((WIDTH,), sparse=True, name="words")
    model = keras.Model(x, EVERY_LAYER["noisy_top_k"]()(x))
    model.compile("sgd", "mse")
    rows, targets = np.float32(COUNTS), np.float32(COUNTS)
    words = sparse(rows)
    data = tf.data.Dataset.from_tensor_slices((words, targets)).batch(3)
    model.fit(data, shuffle=False, verbose=0)
    assert np.isfinite(model.evaluate(data, verbose=0, return_dict=True)["loss"])
    expected = model.predict(words, verbose=0)
    # A server's request is dense.
    folder = keras_moe.export_saved_model(model, tmp_path / "model")
    served = tf.saved_model.load(str(folder)).signatures["serving_default"](words=rows)
    np.testing.assert_allclose(served["outputs"], expected, rtol=1e-4, atol=1e-5)


def test_positions_with_a_mask_may_be_sparse():
    layer = HierarchicalMoE(2, 3, 4)
    x = np.float32(COUNTS).reshape(1, 7, WIDTH)
    mask = np.arange(7)[None] < 5
    dense = layer(x, mask=mask)
    np.testing.assert_allclose(layer(sparse(x), mask=mask), dense, rtol=1e-6)
    assert not np.any(dense[:, 5:])


@pytest.mark.parametrize("contract", CONTRACTS.values(), ids=CONTRACTS.keys())
@pytest.mark.parametrize("dtype", ["complex64", "string"])
def test_what_holds_no_real_numbers_is_refused(contract, dtype):
    layer = contract.built()
    first, *others = contract.inputs()
    if dtype == "string" and keras.config.backend() != "tensorflow":
        pytest.skip("only TensorFlow has tensors of strings")
    x = first.astype(dtype) if dtype != "string" else first.astype(str)
    with pytest.raises(ValueError, match=f"floats, integers or booleans. Received: {dtype}"):
        contract.call(layer, x, *others)
