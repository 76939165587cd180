"""What replicas hold and send, and what they refuse."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from replicas import BATCH, CLASSES, WIDTH, data, fit, flat, hierarchical, make_model, strategy

from keras_moe import LayerExperts, NoisyTopKGating, SparseMoE
from keras_moe.backend.tensorflow import replicas as internals
from keras_moe.distribute import ExpertParallel
from keras_moe.optimizers import FactoredAdam


@functools.cache
def adam_on_4():
    model = make_model(4, lambda: [flat(name="mixture")], keras.optimizers.Adam)
    fit(model, epochs=1)
    return model


def sharded(model):
    variables = [*model.weights, *model.optimizer.variables]
    return [v.value for v in variables if hasattr(v.value, "shards")]


def test_each_replica_holds_its_part_of_the_experts_and_their_slots():
    variables = sharded(adam_on_4())
    assert len(variables) == 4 * 3  # two kernels and two biases, each with two moments
    for variable in variables:
        whole = variable.numpy()
        assert variable.shape == whole.shape and len(whole) == 8
        assert [shard.device[-1] for shard in variable.shards] == ["0", "1", "2", "3"]
        for i, shard in enumerate(variable.shards):
            np.testing.assert_array_equal(shard, whole[2 * i : 2 * i + 2])
            assert 4 * np.asarray(shard).nbytes == whole.nbytes


def test_factored_slots_are_held_in_parts():
    model = make_model(2, lambda: [flat()], FactoredAdam)
    with model.distribute_strategy.scope():
        model.optimizer.build(model.trainable_variables)
    shapes = {v.shape[1:].rank: v.shards[0].shape[0] for v in sharded(model)}
    assert shapes == {2: 4, 1: 4}  # kernels; biases and the means of rows and of columns


def test_secondary_gatings_are_held_in_parts():
    model = make_model(4, lambda: [hierarchical(name="mixture")])
    secondary = model.get_layer("mixture").gating.secondary.value
    assert [tuple(shard.shape) for shard in secondary.shards] == [(2, WIDTH, 2)] * 4


def graphs(graph):
    yield graph
    for function in graph._functions.values():
        yield from graphs(function.graph)


def test_a_step_gathers_no_bank():
    model = adam_on_4()
    step = tf.function(lambda batch: model.distribute_strategy.run(model.train_step, (batch,)))
    x, y = (tf.constant(part[:4]) for part in data())
    graph = step.get_concrete_function((x, y)).graph
    operations = [operation for part in graphs(graph) for operation in part.get_operations()]
    assert sum("CollectiveAllToAll" in operation.type for operation in operations) > 0
    shapes = {tuple(x.shape) for o in operations for x in o.outputs if x.shape.rank == 3}
    assert (2, 4, 5) in shapes and (2, 5, 4) in shapes
    assert (8, 4, 5) not in shapes and (8, 5, 4) not in shapes
    # What all replicas sum is smaller than the smallest bank, the biases [8, 4]: 32 numbers.
    for operation in operations:
        if operation.type == "CollectiveReduceV2" and "mixture" in operation.name:
            assert np.prod(operation.inputs[0].shape.as_list() or [1]) < 32, operation.name


def test_a_variable_reads_and_takes_all_rows_outside_of_replicas():
    model = make_model(2, lambda: [flat(name="mixture")])
    kernel = model.get_layer("mixture").experts.kernels[0]
    rows = np.arange(8 * 4 * 5, dtype="float32").reshape(8, 4, 5)
    kernel.assign(rows)
    np.testing.assert_array_equal(np.asarray(kernel), rows)
    np.testing.assert_array_equal(tf.convert_to_tensor(kernel), rows)
    np.testing.assert_array_equal(kernel.value.assign_add(rows), 2 * rows)
    np.testing.assert_array_equal(kernel.value.shards[1], 2 * rows[4:])

    @tf.function
    def own_rows():
        return model.distribute_strategy.run(lambda: tf.identity(kernel.value)).values

    for part, expected in zip(own_rows(), np.split(2 * rows, 2), strict=True):
        np.testing.assert_array_equal(part, expected)


def test_an_uneven_last_batch_and_a_replica_without_examples():
    model = make_model(2, lambda: [flat(name="mixture"), hierarchical(name="second")])
    x, y = data(number=BATCH + 1)  # the last batch: one example for two replicas
    history = model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0).history
    assert np.isfinite([history[name] for name in history]).all()
    single = make_model(0, lambda: [flat(name="mixture"), hierarchical(name="second")])
    single.set_weights(model.get_weights())
    expected = single.predict(x, batch_size=BATCH, verbose=0)
    got = model.predict(x, batch_size=BATCH, verbose=0)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_noise_differs_from_replica_to_replica_and_repeats():
    def draws():
        with strategy(2).scope() as scope:
            gating = NoisyTopKGating(8, 2, seed=1)
            generator = gating.seed_generator
        run = tf.function(lambda: scope.run(lambda: keras.random.normal((3,), seed=generator)))
        return [np.asarray(part) for _ in range(2) for part in run().values]

    first = draws()
    for i, draw in enumerate(first):
        assert not any(np.any(draw == other) for other in first[:i])
    np.testing.assert_array_equal(first, draws())


def test_the_balance_of_mirrored_experts_is_that_of_the_global_batch():
    def mirrored():
        gating = NoisyTopKGating(8, 2, noise=False)
        return SparseMoE(8, 5, gating=gating, name="mixture", importance_loss_weight=10.0)

    one = make_model(0, lambda: [mirrored()])
    two = make_model(2, lambda: [mirrored()])
    got, expected = fit(two, epochs=2), fit(one, epochs=2)
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-4, err_msg=name)


def test_an_optimizer_that_is_not_wrapped_is_refused():
    model = make_model(2, lambda: [flat()])
    with model.distribute_strategy.scope():
        model.compile("sgd", "mse")
    with pytest.raises(RuntimeError, match=r"distribute\.ExpertParallel\(optimizer\)"):
        fit(model, epochs=1)


def test_replicas_hold_as_many_experts_each():
    with strategy(4).scope():
        layer = SparseMoE(6, 5, expert_parallel=True)
        with pytest.raises(ValueError, match="Received: 6 experts, 4 replicas"):
            layer.build((None, WIDTH))


def test_replicas_hold_as_many_groups_each():
    with strategy(3).scope():
        with pytest.raises(ValueError, match="Received: 8 groups, 3 replicas"):
            hierarchical().build((None, WIDTH))


def test_replicas_that_run_one_after_the_other_are_refused():
    model = make_model(2, lambda: [flat()], run_eagerly=True)
    with pytest.raises(RuntimeError, match="without `run_eagerly`"):
        fit(model, epochs=1)


@pytest.mark.parametrize(
    "arguments",
    [
        {"experts": LayerExperts(8, keras.layers.Dense(CLASSES))},
        {"experts": keras.layers.Dense(CLASSES)},
        {"hidden_units": 5, "gating": "strictly_balanced"},
    ],
)
def test_what_cannot_be_divided_is_refused(arguments):
    with pytest.raises(ValueError, match="expert_parallel=True"):
        SparseMoE(8, expert_parallel=True, **arguments)


def test_loss_scaling_goes_around_the_wrapper():
    def train(num_replicas):
        model = make_model(num_replicas, lambda: [flat(name="mixture", dtype="mixed_float16")])
        with model.distribute_strategy.scope():
            optimizer = ExpertParallel(keras.optimizers.SGD(0.01))
            model.compile(keras.optimizers.LossScaleOptimizer(optimizer, 1024.0), "mse")
        return fit(model, epochs=2)["loss"], model.get_weights()

    (losses, weights), (expected_losses, expected) = train(2), train(0)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-3)
    for x, y in zip(weights, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-2, atol=1e-3)
    with pytest.raises(ValueError, match="Loss scaling goes around the wrapper"):
        ExpertParallel(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()))


@pytest.mark.parametrize("name", ["Adafactor", "Lamb", "Muon"])
def test_optimizers_that_need_whole_variables_are_refused(name):
    with pytest.raises(ValueError, match=f"Received: {name}"):
        ExpertParallel(getattr(keras.optimizers, name)())


def test_what_is_private_in_keras_is_still_there():
    # With another Keras this says at once what `replicas.py` has to be checked for.
    variable = keras.Variable([1.0])
    optimizer = keras.optimizers.Adam(use_ema=True, gradient_accumulation_steps=2, weight_decay=0.1)
    optimizer.build([variable])
    ((of_average, average),) = internals.moving_averages(optimizer)
    assert of_average is variable and average.shape == (1,)
    (slot,) = internals.accumulated_gradients(optimizer, [variable])
    assert slot is not average and slot.shape == (1,)
    assert internals.has_weight_decay(optimizer, variable)
    optimizer.apply([tf.constant([1.0])])
    assert internals.iterations(optimizer).numpy() == 1 and optimizer.iterations.numpy() == 0
    assert internals.has_step_of_its_own(keras.optimizers.Nadam())
    assert not internals.has_step_of_its_own(keras.optimizers.SGD())


def test_what_is_private_in_tensorflow_is_still_there():
    # With another TensorFlow this says at once what `replicas.py` has to be checked for.
    launchers = internals._launchers(strategy(2))
    assert [launcher._group_size for launcher in launchers] == [2, 2]
    for launcher in launchers:
        assert launcher._device and launcher._group_key and launcher._options.implementation
        assert launcher._next_instance_key().dtype == tf.int32
        assert launcher._get_ordering_token().dtype == tf.resource
