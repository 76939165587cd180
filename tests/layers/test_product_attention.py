"""`ProductAttention` beside a loop over all pairs, and `AdditiveAttention` beside its formula."""

import keras
import numpy as np
import pytest
from finite_differences import TOLERANCE, differences
from gradients import with_gradients
from keras import ops
from keras.ops import convert_to_numpy as numpy
from reference_attention import product_attention

from keras_moe.layers import AdditiveAttention, ProductAttention

BATCH, STEPS, SOURCES, UNITS = 3, 4, 5, 7
WIDTHS = {"query": 3, "value": 2, "key": 6}
# One source is whole, one ends early, and of one there is nothing.
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
WEIGHTS = ("query_kernel", "key_kernel", "scale")


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    lengths = {"query": STEPS, "value": SOURCES, "key": SOURCES}
    return {name: rng.normal(size=(BATCH, lengths[name], d)) for name, d in WIDTHS.items()}


def made(kind=ProductAttention, dtype=None):
    layer = kind(UNITS, dtype=dtype)
    layer.build([(None, None, d) for d in WIDTHS.values()])
    rng = np.random.default_rng(1)
    layer.set_weights([rng.normal(size=weight.shape) for weight in layer.weights])
    return layer


def expected_of(layer, arrays, mask):
    weights = {name: numpy(getattr(layer, name)).astype("float64") for name in WEIGHTS}
    return product_attention(**arrays, **weights, mask=mask)


@pytest.mark.parametrize("way", ["eager", "graph"])
@pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "mask"])
def test_contexts_weights_and_gradients_equal_a_loop(mask, way):
    layer, arrays = made(), inputs()
    upstream = np.random.default_rng(2).normal(size=(BATCH, STEPS, WIDTHS["value"]))

    def step(query, value, key):
        context, weights = layer(
            [query, value, key],
            mask=None if mask is None else [None, ops.convert_to_tensor(mask)],
            return_attention_scores=True,
        )
        return ops.sum(context * upstream.astype("float32")), (context, weights)

    tensors = [array.astype("float32") for array in arrays.values()]
    variables = [getattr(layer, name) for name in WEIGHTS]
    (context, weights), *gradients = with_gradients(step, tensors, variables, way)
    expected_context, expected_weights, backward = expected_of(layer, arrays, mask)
    np.testing.assert_allclose(context, expected_context, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-4, atol=1e-6)
    wanted = backward(upstream)
    for name, gradient in zip((*WIDTHS, *WEIGHTS), sum(map(list, gradients), []), strict=True):
        np.testing.assert_allclose(gradient, wanted[name], rtol=1e-3, atol=1e-4, err_msg=name)


def test_the_loops_gradients_equal_differences():
    rng = np.random.default_rng(3)
    arrays = {name: rng.normal(size=(2, 2, d)) for name, d in WIDTHS.items()}
    arrays |= {
        "query_kernel": rng.normal(size=(WIDTHS["query"], 3)),
        "key_kernel": rng.normal(size=(WIDTHS["key"], 3)),
        "scale": rng.normal(size=3),
    }
    mask = np.array([[True, True], [True, False]])
    upstream = rng.normal(size=(2, 2, WIDTHS["value"]))
    gradients = product_attention(**arrays, mask=mask)[2](upstream)
    for name, array in arrays.items():
        moved = differences(
            lambda: np.sum(product_attention(**arrays, mask=mask)[0] * upstream), array
        )
        np.testing.assert_allclose(gradients[name], moved, **TOLERANCE, err_msg=name)


@pytest.mark.parametrize("kind", [ProductAttention, AdditiveAttention])
def test_what_padding_holds_is_never_seen(kind):
    layer, arrays = made(kind), inputs()
    others = {name: array.copy() for name, array in arrays.items()}
    others["value"][~MASK] = np.nan
    others["key"][~MASK] = np.nan
    mask = [None, ops.convert_to_tensor(MASK)]
    results = [
        layer([a.astype("float32") for a in part.values()], mask, return_attention_scores=True)
        for part in (arrays, others)
    ]
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    context, weights = results[0]
    np.testing.assert_array_equal(numpy(weights).transpose(0, 2, 1)[~MASK], 0)
    np.testing.assert_allclose(numpy(weights)[:2].sum(axis=-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(context[2], np.zeros((STEPS, WIDTHS["value"])))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_is_close(policy):
    layer, arrays = made(dtype=policy), inputs()
    context, weights = layer(list(arrays.values()), [None, MASK], return_attention_scores=True)
    assert context.dtype == weights.dtype == layer.compute_dtype
    assert layer.query_kernel.dtype == "float32"
    expected_context, expected_weights, _ = expected_of(layer, arrays, MASK)
    # 8 bits of a bfloat16 behind the point, and scores of up to about 5.
    np.testing.assert_allclose(ops.cast(weights, "float32"), expected_weights, atol=0.05)
    np.testing.assert_allclose(ops.cast(context, "float32"), expected_context, atol=0.1)


def test_the_key_is_the_value_where_none_is_given_and_masked_queries_get_zeros():
    layer, arrays = ProductAttention(UNITS), inputs()
    query_mask = np.arange(STEPS) < [[4], [2], [1]]
    two = layer([arrays["query"], arrays["value"]], [query_mask, None])
    three = layer([arrays["query"], arrays["value"], arrays["value"]])
    np.testing.assert_allclose(two, np.where(query_mask[..., None], three, 0), rtol=1e-6)
    assert layer.compute_output_shape([(3, 4, 3), (3, 5, 2)]) == (3, 4, 2)


def test_additive_attention_is_the_tanh_of_a_sum():
    layer, arrays = made(AdditiveAttention), inputs()
    context, weights = layer(list(arrays.values()), return_attention_scores=True)
    query_kernel, key_kernel, scale = (numpy(weight) for weight in layer.weights)
    for b in range(BATCH):
        for t in range(STEPS):
            hidden = np.tanh(arrays["key"][b] @ key_kernel + arrays["query"][b, t] @ query_kernel)
            chances = np.exp(hidden @ scale) / np.exp(hidden @ scale).sum()
            np.testing.assert_allclose(weights[b, t], chances, rtol=1e-4)
            np.testing.assert_allclose(context[b, t], chances @ arrays["value"][b], rtol=1e-3)


@pytest.mark.parametrize("kind", [ProductAttention, AdditiveAttention])
def test_saved_model_comes_back(kind, tmp_path):
    query, value = keras.Input((None, 3)), keras.Input((None, 2))
    model = keras.Model([query, value], kind(UNITS)([query, value]))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    arrays = [inputs()[name].astype("float32") for name in ("query", "value")]
    np.testing.assert_array_equal(loaded(arrays), model(arrays))
    assert loaded.layers[-1].get_config() == model.layers[-1].get_config()


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="`units` must be .*Received: 0"):
        ProductAttention(0)
    with pytest.raises(ValueError, match=r"\[query, value\] or \[query, value, key\].*Received"):
        ProductAttention(2)(np.zeros((1, 2, 3), "float32"))
