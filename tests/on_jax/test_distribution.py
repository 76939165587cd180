"""Experts divided among the devices of `keras.distribution`: 8, as `conftest.py` has them made."""

import functools
import re

import jax
import keras
import numpy as np
import pytest
from combinations import covering, usually

from keras_moe import FeedForwardExperts, HierarchicalMoE, SparseMoE
from keras_moe.distribute import ExpertParallel
from keras_moe.optimizers import FactoredAdam

WIDTH, CLASSES, BATCH = 4, 3, 16


@pytest.fixture(autouse=True)
def no_distribution_after():
    yield
    keras.distribution.set_distribution(None)


def devices(number):
    return keras.distribution.list_devices("cpu")[:number]


def data_parallel(num_replicas):
    return keras.distribution.DataParallel(devices=devices(num_replicas))


def model_parallel(layouts, shape=(4, 2)):
    """Replicas along the first axis of a mesh, and a second one for layers that the map names."""
    mesh = keras.distribution.DeviceMesh(shape, ["batch", "model"], devices(8))
    layout_map = keras.distribution.LayoutMap(mesh)
    for path, axes in layouts.items():
        layout_map[path] = axes
    return keras.distribution.ModelParallel(layout_map=layout_map, batch_dim_name="batch")


flat = functools.partial(SparseMoE, 8)
hierarchical = functools.partial(HierarchicalMoE, 8, 2)


def mixtures():
    """Flat and hierarchical, with and without a capacity, with noise that is that of one device."""
    for capacity in (None, 1.0):
        options = {"capacity_factor": capacity, "use_bias": True, "expert_parallel": True}
        yield flat(5, k=2, seed=1, **options)
        yield hierarchical(5, k=(2, 2), seed=2, **options)


def make_model(distribution, layers, make_optimizer=keras.optimizers.Adam):
    """A model between two dense layers, with the same weights for any distribution."""
    keras.backend.clear_session()
    keras.distribution.set_distribution(distribution)
    model = keras.Sequential([keras.Input((None, WIDTH)), keras.layers.Masking()])
    for layer in [keras.layers.Dense(WIDTH), *layers, keras.layers.Dense(CLASSES)]:
        model.add(layer)
    rng = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(0.5 * rng.normal(size=weight.shape))
    model.compile(make_optimizer(), "mse")
    return model


def data():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(BATCH, 2, WIDTH)).astype("float32")
    x[::3, 1] = 0.0  # A mask.
    return x, rng.normal(size=(BATCH, 2, CLASSES)).astype("float32")


def state(model):
    return [np.asarray(v) for v in [*model.weights, *model.optimizer.variables]]


@functools.cache
def trained(num_replicas):
    """A model after three steps of `fit`, and its history."""
    model = make_model(data_parallel(num_replicas), mixtures())
    history = model.fit(*data(), batch_size=BATCH, epochs=3, shuffle=False, verbose=0).history
    return model, history


@pytest.mark.parametrize("num_replicas", [*usually([], [2, 4]), 8])
def test_replicas_train_as_one_device(num_replicas):
    (got, history), (expected, wanted) = trained(num_replicas), trained(1)
    assert history.keys() == wanted.keys()  # Among them the balance and the fraction dropped.
    for name in wanted:
        np.testing.assert_allclose(history[name], wanted[name], 1e-4, err_msg=name)
    for x, y in zip(state(got), state(expected), strict=True):
        np.testing.assert_allclose(x, y, 1e-4, atol=1e-6)


def divided(model, num_replicas):
    """The variables of which each device holds as many rows, by the bytes of the shards."""
    for variable in [*model.weights, *model.optimizer.variables]:
        shards = variable.value.addressable_shards
        assert len(shards) == num_replicas
        if any(shard.data.nbytes != variable.value.nbytes for shard in shards):
            for i, shard in enumerate(sorted(shards, key=lambda shard: shard.device.id)):
                assert shard.data.nbytes * num_replicas == variable.value.nbytes
                rows = len(variable.value) // num_replicas
                assert shard.index[0] == slice(i * rows, (i + 1) * rows)
            yield variable


def test_each_device_holds_its_part_of_the_experts_and_their_slots():
    model, _ = trained(8)
    # Two kernels and two biases of four banks, and the secondary kernels of two gatings, one of
    # them of the noise; two moments of each.
    assert len(list(divided(model, 8))) == 3 * (4 * 4 + 2 * 2)


def test_factored_slots_are_held_in_parts():
    layer = SparseMoE(8, 5, k=2, expert_parallel=True)
    model = make_model(data_parallel(4), [layer], FactoredAdam)
    model.optimizer.build(model.trainable_variables)
    shapes = sorted(variable.shape for variable in divided(model, 4))
    # Two kernels, with the means of their rows and of their columns.
    assert shapes == sorted([(8, 4, 5), (8, 5, 4), (8, 4), (8, 5), (8, 5), (8, 4)])


def collectives(model):
    """The shapes of what a compiled step of training sends, by the operation."""
    variables = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state = tuple([v.value for v in part] for part in variables)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    distribution = keras.distribution.distribution()
    x, y = (jax.device_put(x, distribution.get_data_layout(x.shape).backend_layout) for x in data())
    step = jax.jit(model.train_step, out_shardings=(None, shardings))
    text = step.lower(state, (x, y)).compile().as_text()
    sent = re.findall(r"= (.*?) ((?:all|collective)-[a-z-]+|reduce-scatter)\(", text)
    for results, operation in sent:
        for sizes in re.findall(r"\[([\d,]*)\]", results):
            yield operation, tuple(int(size) for size in sizes.split(",") if size)


def test_a_step_moves_no_experts():
    model, _ = trained(8)
    keras.distribution.set_distribution(data_parallel(8))
    sent = list(collectives(model))
    # Rows [R, size, D] to the experts and back, their numbers before.
    assert {len(shape) for operation, shape in sent if operation == "all-to-all"} >= {2, 3}
    # All else is smaller than a kernel: 8·4·5, of one device 4·5. What is summed are gradients of
    # what is mirrored, at most the kernels of gatings [4, 8], and the balance.
    for operation, shape in sent:
        if operation != "all-to-all":
            assert operation == "all-reduce" and np.prod(shape) <= 4 * 8, (operation, shape)


def test_files_are_read_for_another_number_of_replicas(tmp_path):
    model, _ = trained(8)
    model.save(tmp_path / "model.keras")
    keras.distribution.set_distribution(data_parallel(2))
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert len(list(divided(loaded, 2))) == len(list(divided(model, 8)))
    for x, y in zip(state(loaded), state(model), strict=True):
        np.testing.assert_array_equal(x, y)


@covering(
    [("flat", "None"), ("hierarchical", "1.0")],
    make={"flat": flat, "hierarchical": hierarchical},
    capacity=[None, 1.0],
)
def test_a_number_of_examples_that_replicas_do_not_divide(make, capacity):
    """Beside a second axis of the mesh, along which others may be divided; and all for a device."""
    x = np.random.default_rng(0).normal(size=(11, WIDTH)).astype("float32")
    results = []
    for distribution in (None, model_parallel({".*gate_kernel": (None, "model")})):
        keras.distribution.set_distribution(distribution)
        layer = make(5, capacity_factor=capacity, expert_parallel=True)
        layer.gating.noise = False
        layer.build((None, WIDTH))
        rng = np.random.default_rng(0)
        for weight in layer.weights:
            weight.assign(rng.normal(size=weight.shape))

        def loss(trainable, x, layer=layer):
            others = [v.value for v in layer.non_trainable_variables]
            y, _ = layer.stateless_call(trainable, others, x, training=True)
            return (y**2).sum(), y

        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        results.append(step([v.value for v in layer.trainable_variables], x))
        for weight in layer.gating.weights:  # A tie: all go to the first experts.
            weight.assign(np.zeros(weight.shape))
        results.append(step([v.value for v in layer.trainable_variables], x))
    kernel = layer.experts.kernels[0].value
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(len(kernel) // 4, 4, 5)}
    if make is flat:
        assert layer.gating.gate_kernel.value.addressable_shards[0].data.shape == (4, 4)
    one, four = map(jax.tree.leaves, (results[:2], results[2:]))
    for got, expected in zip(four, one, strict=True):
        np.testing.assert_allclose(got, expected, 1e-4, atol=1e-5)


@pytest.mark.parametrize("number", [3, *usually([], [1])])
def test_a_batch_that_replicas_do_not_divide(number):
    """A number of sequences of two examples, one of which is masked: 8 replicas for 6 examples."""
    one, eight = (trained(num_replicas)[0] for num_replicas in (1, 8))
    answers = []
    for model, num_replicas in ((one, 1), (eight, 8)):
        keras.distribution.set_distribution(data_parallel(num_replicas))
        if model is eight:
            model.set_weights(one.get_weights())
        answers.append(model.predict_on_batch(data()[0][:number]))
    np.testing.assert_allclose(*answers, rtol=1e-5, atol=1e-6)


def test_keras_itself_refuses_batches_that_replicas_do_not_divide():
    """With or without a mixture, as `docs/limits.md` says."""
    model = make_model(data_parallel(4), [])
    x, y = data()
    for use in (model.fit, model.evaluate, model.predict):
        with pytest.raises(ValueError, match="evenly divide the shape|should be divisible by 4"):
            use(x[:6], *([] if use == model.predict else [y[:6]]), verbose=0)


def test_replicas_hold_as_many_experts_or_groups_each():
    keras.distribution.set_distribution(data_parallel(4))
    with pytest.raises(ValueError, match="Received: 6 experts, 4 replicas"):
        SparseMoE(6, 5, expert_parallel=True).build((None, WIDTH))
    with pytest.raises(ValueError, match="Received: 2 groups, 4 replicas"):
        HierarchicalMoE(2, 4, 5, expert_parallel=True).build((None, WIDTH))


def test_experts_in_int8_are_held_in_parts():
    keras.distribution.set_distribution(data_parallel(4))
    layer = SparseMoE(8, 5, expert_parallel=True)
    layer.build((None, WIDTH))
    layer.experts.quantize("int8")
    assert {v.value.addressable_shards[0].data.shape[0] for v in layer.experts.weights} == {2}
    call(layer)


def test_another_layout_of_experts_is_refused():
    keras.distribution.set_distribution(model_parallel({".*kernel_0": (None, None, "model")}))
    with pytest.raises(ValueError, match="leave its variables out of the layout map"):
        SparseMoE(8, 5, expert_parallel=True).build((None, WIDTH))


def call(layer):
    """Traces a call, which runs nothing."""
    x = jax.ShapeDtypeStruct((8, WIDTH), "float32")
    return jax.eval_shape(lambda x: layer(x, training=False), x)


def test_layers_that_were_built_before_are_refused():
    layer = SparseMoE(8, 5, expert_parallel=True)
    layer.build((None, WIDTH))
    for number in (4, 2):  # Without a distribution, then with another one.
        keras.distribution.set_distribution(data_parallel(number))
        with pytest.raises(RuntimeError, match=r"set_distribution\(distribution\)`, then build"):
            call(layer)
        layer = SparseMoE(8, 5, expert_parallel=True)
        layer.build((None, WIDTH))


class Dropping(FeedForwardExperts):
    """Experts with noise, whose seed changes as they compute."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seed_generator = keras.random.SeedGenerator(0)

    def call(self, rows, rows_per_expert=None, training=None):
        rows = keras.random.dropout(rows, 0.5, seed=self.seed_generator)
        return super().call(rows, rows_per_expert)


def test_experts_that_change_variables_are_refused():
    keras.distribution.set_distribution(data_parallel(4))
    layer = SparseMoE(8, experts=Dropping(8, 5, expert_parallel=True), expert_parallel=True)
    layer.build((None, WIDTH))
    with pytest.raises(RuntimeError, match="can't change variables while they compute"):
        call(layer)


def test_the_wrapper_of_optimizers_changes_nothing(tmp_path):
    inner = functools.partial(keras.optimizers.Adam, 0.1)
    models = [make_model(None, [], make) for make in (inner, lambda: ExpertParallel(inner()))]
    for model in models:
        model.fit(*data(), batch_size=BATCH, epochs=2, shuffle=False, verbose=0)
    plain, wrapped = models
    for x, y in zip(plain.get_weights(), wrapped.get_weights(), strict=True):
        np.testing.assert_array_equal(x, y)
    assert float(wrapped.optimizer.learning_rate) == float(np.float32(0.1))
    assert int(wrapped.optimizer.iterations) == 2
    wrapped.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for x, y in zip(state(loaded), state(wrapped), strict=True):
        np.testing.assert_array_equal(x, y)
