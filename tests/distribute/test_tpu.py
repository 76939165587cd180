"""Expert parallelism on TPUs, as far as it can be tested without one."""

import functools
import importlib.util

import absent_tpu
import numpy as np
import pytest
import tensorflow as tf
from replicas import CLASSES, WIDTH, data, flat, hierarchical, make_model, state

from keras_moe.distribute.sharded_variable import ShardedVariable
from keras_moe.optimizers import FactoredAdam

NUM_REPLICAS = 4
LAYERS = {"flat": flat, "hierarchical": hierarchical}
X, Y = data()  # 16 examples, and so 4 for each replica
SPECS = [tf.TensorSpec([len(X) // NUM_REPLICAS, 2, size]) for size in (WIDTH, CLASSES)]


def has_jax():
    """Whether JAX is there as these tests know it, whose devices get a program of TensorFlow."""
    if importlib.util.find_spec("jax") is None:
        return False
    import jax

    return jax.__version_info__ >= (0, 10)


needs_jax = pytest.mark.skipif(not has_jax(), reason="needs JAX 0.10, of keras_moe[jax]")


def make_compiled_model(replicas, layers):
    """A model that has taken no step yet, but has its optimizer's slots."""
    model = make_model(
        replicas,
        lambda: [LAYERS[layers](capacity_factor=0.6, name="mixture")],
        FactoredAdam,
        metrics=(),  # Keras makes their variables while it trains.
        jit_compile=False,
    )
    with replicas.scope():
        model.optimizer.build(model.trainable_variables)
    return model


@functools.cache
def operations_of_step(layers):
    """All operations that `TPUStrategy` traces of a training step, those of loops included."""
    strategy = absent_tpu.make_strategy(NUM_REPLICAS, packed=True)
    model = make_compiled_model(strategy, layers)

    @tf.function(autograph=False)
    def step(x, y):
        return strategy.run(model.train_step, ((x, y),))

    graph = step.get_concrete_function(*SPECS).graph
    functions = [function.graph for function in graph._functions.values()]
    return [o for part in (graph, *functions) for o in part.get_operations()]


@pytest.mark.parametrize("layers", LAYERS)
def test_replicas_exchange_rows_among_all(layers):
    collectives = [
        o for o in operations_of_step(layers) if o.type in ("AllToAll", "CrossReplicaSum")
    ]
    for collective in collectives:
        groups = tf.get_static_value(collective.inputs[1])
        np.testing.assert_array_equal(groups, [range(NUM_REPLICAS)])
    exchanges = [o for o in collectives if o.type == "AllToAll"]
    assert {o.get_attr("split_count") for o in exchanges} == {NUM_REPLICAS}
    assert {o.inputs[0].shape[0] for o in exchanges} == {NUM_REPLICAS}
    # Rows to the experts and back, and so in the backward pass; those to the gatings of groups come
    # back as logits of the 2 experts of a group.
    widths = sorted(o.inputs[0].shape[-1] for o in exchanges if o.inputs[0].dtype == tf.float32)
    assert widths == {"flat": [WIDTH] * 4, "hierarchical": [2] * 2 + [WIDTH] * 6}[layers]


@pytest.mark.parametrize("layers", LAYERS)
def test_a_replica_updates_its_experts_by_gradients_that_are_not_summed(layers):
    found = operations_of_step(layers)
    shapes = {
        o.inputs[0].name.split("/")[-2]: tuple(o.inputs[1].shape)
        for o in found
        if o.type in ("AssignSubVariableOp", "AssignAddVariableOp")
        and "experts" in o.inputs[0].name
    }
    # 8 or 16 experts on 4 replicas.
    n = {"flat": 8, "hierarchical": 16}[layers] // NUM_REPLICAS
    assert shapes["kernel_0"] == (n, WIDTH, 5)
    assert shapes["kernel_1"] == (n, 5, WIDTH)
    (row_means,) = [shape for name, shape in shapes.items() if name.endswith("kernel_0_row_means")]
    assert row_means == (n, WIDTH)
    summed = {tuple(o.inputs[0].shape) for o in found if o.type == "CrossReplicaSum"}
    assert (WIDTH, WIDTH) in summed  # the first dense layer's kernel
    assert not {(n, WIDTH, 5), (n, 5, WIDTH)} & summed


def test_a_variable_in_shards_on_the_host_of_a_tpu():
    strategy = absent_tpu.make_strategy(NUM_REPLICAS)
    model = make_compiled_model(strategy, "flat")
    kernel = model.get_layer("mixture").experts.kernels[0]
    rows = np.random.default_rng(0).normal(size=kernel.shape).astype("float32")
    assert rows.shape == (8, WIDTH, 5)
    kernel.assign(rows)
    np.testing.assert_array_equal(np.asarray(kernel), rows)
    np.testing.assert_array_equal(kernel.value.shards[1].numpy(), rows[2:4])


def run_on_chips(model, strategy):
    """Takes a training step as the chips of a TPU would, on as many CPUs of jax."""
    import jax
    from jaxlib.mlir import ir

    jax.config.update("jax_num_cpu_devices", NUM_REPLICAS)
    jax.config.update("jax_enable_x64", True)  # There are integers of 64 bits.
    devices = jax.devices("cpu")
    alike = jax.sharding.NamedSharding(
        jax.sharding.Mesh(devices, "r"), jax.sharding.PartitionSpec()
    )

    def on_devices(parts):
        arrays = [jax.device_put(p, d) for p, d in zip(parts, devices, strict=True)]
        return jax.make_array_from_single_device_arrays(parts[0].shape, alike, arrays)

    step = absent_tpu.of_one_chip(strategy, lambda x, y: model.train_step((x, y)))
    captured = step.get_concrete_function(*SPECS).captured_inputs
    components = [handle._distributed_container()._values for handle in captured]
    arguments = [np.split(x, NUM_REPLICAS) for x in (X, Y)]
    arguments += [[part.numpy() for part in parts] for parts in components]

    with absent_tpu.reading(absent_tpu.lower(step, *SPECS)) as module:
        aliases = module.operation.attributes["mhlo.input_output_alias"]
        updated = [
            (alias["alias"]["parameter_number"].value, list(alias["output_index"])[0])
            for alias in map(ir.DictAttr, aliases)
        ]
        executable = devices[0].client.compile_and_load(module, *absent_tpu.options_for(devices))
    results = executable.execute_sharded([on_devices(parts) for parts in arguments])
    results = results.disassemble_into_single_device_arrays()
    for parameter, output in updated:
        for part, result in zip(components[parameter - 2], results[output], strict=True):
            part.assign(np.asarray(result))


@needs_jax
@pytest.mark.parametrize("layers", LAYERS)
def test_chips_take_the_step_that_one_device_takes(layers):
    expected = make_compiled_model(tf.distribute.get_strategy(), layers)
    expected.train_on_batch(X, Y)
    strategy = absent_tpu.make_strategy(NUM_REPLICAS)
    model = make_compiled_model(strategy, layers)
    run_on_chips(model, strategy)
    for got, wanted in zip(state(model), state(expected), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)
    for variable in model.trainable_variables:
        if not isinstance(variable.value, ShardedVariable):
            first, *others = (part.numpy() for part in variable.value._values)
            for other in others:
                np.testing.assert_array_equal(other, first)


def test_the_collectives_become_those_of_xla():
    groups = [list(range(NUM_REPLICAS))]

    @tf.function
    def exchange_and_add(x):
        x = tf.raw_ops.AllToAll(
            input=x,
            group_assignment=groups,
            concat_dimension=0,
            split_dimension=0,
            split_count=NUM_REPLICAS,
        )
        return tf.raw_ops.CrossReplicaSum(input=x, group_assignment=groups)

    function = exchange_and_add.get_concrete_function(tf.TensorSpec([NUM_REPLICAS, 3]))
    module = tf.mlir.experimental.convert_function(function)
    lowered = tf.mlir.experimental.run_pass_pipeline(module, "xla-legalize-tf")
    (exchange,) = [line for line in lowered.splitlines() if "mhlo.all_to_all" in line]
    (total,) = [line for line in lowered.splitlines() if "mhlo.cross-replica-sum" in line]
    assert "tf." not in exchange + total
    for attribute in ("concat_dimension = 0", "split_dimension = 0", "split_count = 4"):
        assert attribute in exchange
    assert f"replica_groups = dense<{groups}>" in exchange
    assert f"replica_groups = dense<{groups}>" in total
