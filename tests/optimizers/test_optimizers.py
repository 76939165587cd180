"""`FactoredAdam`: its numbers against the oracle, Keras' options, and what it refuses."""

import keras
import numpy as np
import pytest
from keras import ops
from keras.ops import convert_to_numpy as numpy
from reference_optimizers import adam, factored_adam

from keras_moe.optimizers import FactoredAdam

BETA_1, BETA_2, EPSILON, STEPS = 0.8, 0.9, 1e-3, 6
RATE = 0.125  # exact in float32, in which Keras keeps it


def make_variables(dtype="float32"):
    """A bank's kernel and bias, the matrix of an expert that stands alone, and two of no expert."""
    shapes = {"kernel": (3, 4, 5), "bias": (3, 5), "alone": (4, 5), "dense": (4, 3), "offset": (3,)}
    rng = np.random.default_rng(0)
    variables = {
        name: keras.Variable(rng.normal(size=shape), dtype=dtype, name=name)
        for name, shape in shapes.items()
    }
    for name, rank in {"kernel": 2, "bias": 1, "alone": 2}.items():
        variables[name].expert_rank = rank
    return variables


def make_gradients(steps=STEPS):
    """Expert 1 has no rows in every other step, expert 2 never has one; neither has row 3."""
    rng, gradients = np.random.default_rng(1), []
    for step in range(steps):
        values = {name: rng.normal(size=v.shape) for name, v in make_variables().items()}
        for name in ("kernel", "bias"):
            values[name][1] *= step % 2
            values[name][2] = 0.0
        values["kernel"][0, 3] = 0.0
        values["kernel"] *= 1e-3  # of the size of epsilon
        gradients.append(values)
    return gradients


def expected(name, w, gradients, rates, beta_1=BETA_1, beta_2=BETA_2, epsilon=EPSILON):
    """The oracle's values of a variable after each step."""
    if name == "kernel":
        experts = [
            factored_adam(w[i], [g[i] for g in gradients], rates, beta_2, epsilon)
            for i in range(len(w))
        ]
        return [np.stack(step) for step in zip(*experts, strict=True)]
    if name == "alone":
        return factored_adam(w, gradients, rates, beta_2, epsilon)
    return adam(w, gradients, rates, 0.0 if name == "bias" else beta_1, beta_2, epsilon)


def make_optimizer(learning_rate=RATE, **options):
    return FactoredAdam(learning_rate, BETA_1, BETA_2, EPSILON, **options)


# JAX would compile each operation for itself.
USUAL = "eager" if keras.config.backend() == "tensorflow" else "xla"


def compiled(optimizer, variables, way):
    """A function of gradients that takes a step of the optimizer."""
    if way == "eager":
        return lambda gradients: optimizer.apply(gradients, variables)
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        @tf.function(jit_compile=way == "xla", autograph=False)
        def step(gradients):
            optimizer.apply(gradients, variables)

        return step
    import jax

    pure, everything = jax.jit(optimizer.stateless_apply), [variables, optimizer.variables]

    def step(gradients):
        weights, slots = ([v.value for v in each] for each in everything)
        for each, values in zip(everything, pure(slots, gradients, weights), strict=True):
            for variable, value in zip(each, values, strict=True):
                variable.assign(value)

    return step


def applied(optimizer, variables, gradients, way=USUAL):
    """The variables after each step."""
    dtype = next(iter(variables.values())).dtype
    optimizer.build(list(variables.values()))
    step, after = compiled(optimizer, list(variables.values()), way), []
    for values in gradients:
        step([ops.convert_to_tensor(value, dtype) for value in values.values()])
        after.append({name: numpy(variable) for name, variable in variables.items()})
    return after


def assert_agrees(received, wanted, rtol=1e-5, atol=1e-6):
    assert len(received) == len(wanted["kernel"])
    for step, values in enumerate(received):
        for name, value in values.items():
            np.testing.assert_allclose(
                value, wanted[name][step], rtol, atol, err_msg=f"{name}, step {step}"
            )


def transposed(gradients):
    return {name: [values[name] for values in gradients] for name in gradients[0]}


GRAPH = pytest.param("graph", marks=pytest.mark.tensorflow("JAX compiles all or nothing"))
FLOAT64 = pytest.param("float64", marks=pytest.mark.tensorflow("JAX has it only if told so"))


@pytest.mark.parametrize("way", ["eager", GRAPH, "xla"])
@pytest.mark.parametrize("dtype", ["float32", FLOAT64])
def test_every_step_agrees_with_the_oracle(dtype, way):
    variables, gradients = make_variables(dtype), make_gradients()
    start = {name: numpy(variable) for name, variable in variables.items()}
    wanted = {
        name: expected(name, start[name], values, [RATE] * STEPS)
        for name, values in transposed(gradients).items()
    }
    received = applied(make_optimizer(), variables, gradients, way)
    assert_agrees(received, wanted, *((1e-12, 1e-12) if dtype == "float64" else ()))
    # The test would see a first moment, or a second one that is not factored.
    for name, other in {"kernel": 0.0, "bias": BETA_1, "alone": 0.0, "dense": 0.0}.items():
        values = transposed(gradients)[name]
        wrong = adam(start[name], values, [RATE] * STEPS, other, BETA_2, EPSILON)
        assert np.abs(wrong[-1] - wanted[name][-1]).max() > 1e-2


def clipped_by_norm(g):
    return g * min(1.0, 0.5 / np.linalg.norm(g))


def scaled_globally(gradients):
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in gradients.values()))
    return {name: g * min(1.0, 0.5 / norm) for name, g in gradients.items()}


# What each option of Keras does to the gradients of a step before the optimizer sees them.
OPTIONS = {
    "clipnorm": (0.5, lambda step: {name: clipped_by_norm(g) for name, g in step.items()}),
    "clipvalue": (0.3, lambda step: {name: np.clip(g, -0.3, 0.3) for name, g in step.items()}),
    "global_clipnorm": (0.5, scaled_globally),
    "loss_scale_factor": (8.0, lambda step: {name: g / 8 for name, g in step.items()}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_that_change_the_gradients(option):
    value, change = OPTIONS[option]
    variables, gradients = make_variables(), make_gradients()
    changed = transposed([change(values) for values in gradients])
    wanted = {
        name: expected(name, numpy(variable), changed[name], [RATE] * STEPS)
        for name, variable in variables.items()
    }
    assert_agrees(applied(make_optimizer(**{option: value}), variables, gradients), wanted)


def test_gradients_are_accumulated():
    variables, gradients = make_variables(), make_gradients(2 * STEPS)
    pairs = transposed(gradients)
    start = {name: numpy(variable) for name, variable in variables.items()}
    # One update in every second step, by the mean of two gradients.
    wanted = {}
    for name, g in pairs.items():
        means = [(a + b) / 2 for a, b in zip(g[::2], g[1::2], strict=True)]
        updates = expected(name, start[name], means, [RATE] * STEPS)
        wanted[name] = [start[name], *np.repeat(updates, 2, axis=0)[:-1]]
    optimizer = make_optimizer(gradient_accumulation_steps=2)
    assert_agrees(applied(optimizer, variables, gradients), wanted)


def test_weight_decay_spares_what_is_excluded():
    variables, gradients = make_variables(), make_gradients(1)
    start = {name: numpy(variable) for name, variable in variables.items()}
    # w - wd·lr·w before the update, which does not depend on w.
    wanted = {
        name: expected(
            name, w * (1 if name == "bias" else 1 - 0.2 * RATE), [gradients[0][name]], [RATE]
        )
        for name, w in start.items()
    }
    optimizer = make_optimizer(weight_decay=0.2)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    assert_agrees(applied(optimizer, variables, gradients), wanted)


def test_averages_of_the_variables():
    variables, gradients = make_variables(), make_gradients()
    start = {name: numpy(variable) for name, variable in variables.items()}
    optimizer = make_optimizer(use_ema=True, ema_momentum=0.5)
    received = applied(optimizer, variables, gradients)
    assert_agrees(
        received,
        {n: expected(n, start[n], g, [RATE] * STEPS) for n, g in transposed(gradients).items()},
    )
    optimizer.finalize_variable_values(list(variables.values()))
    for name, variable in variables.items():
        average = received[0][name]
        for step in received[1:]:
            average = 0.5 * average + 0.5 * step[name]
        np.testing.assert_allclose(variable, average, rtol=1e-5)


def test_a_schedule_of_the_learning_rate_that_begins_at_zero():
    rates = [0.0, 0.0, 0.05, 0.05, 0.01, 0.01]
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1, 3], [0.0, 0.05, 0.01])
    variables, gradients = make_variables(), make_gradients()
    wanted = {
        name: expected(name, numpy(variables[name]), values, rates)
        for name, values in transposed(gradients).items()
    }
    assert_agrees(applied(make_optimizer(schedule), variables, gradients), wanted)


def test_an_expert_without_rows_stays_as_it_is():
    variables, gradients = make_variables(), make_gradients()
    start = {name: numpy(variable) for name, variable in variables.items()}
    received = applied(FactoredAdam(), variables, gradients)
    for name in ("kernel", "bias"):
        for step, now in enumerate(received):
            before = received[step - 1] if step else start
            np.testing.assert_array_equal(now[name][2], before[name][2])  # never has a row
            assert np.array_equal(now[name][1], before[name][1]) == (step % 2 == 0)
            assert np.isfinite(now[name]).all()


@pytest.mark.parametrize("scale", [1e-25, 1e-18, 1e15])
def test_gradients_of_any_size(scale):
    # Their squares leave the range of float32 below, and so does the product of two means. For
    # equal squares v = g², so that the step is alpha·g / (|g| + epsilon), as Adam's.
    variable = keras.Variable(np.zeros((2, 4, 5), "float32"))
    variable.expert_rank = 2
    gradient = scale * np.random.default_rng(0).choice([-1.0, 1.0], size=(2, 4, 5))
    optimizer = FactoredAdam(0.1)
    optimizer.build([variable])
    optimizer.apply([ops.convert_to_tensor(gradient, "float32")])
    root = np.sqrt(0.001) * scale if scale > 1e-19 else 0.0
    wanted = -0.1 * np.sqrt(0.001) * gradient / (root + 1e-7)
    np.testing.assert_allclose(variable, wanted, rtol=1e-3)


def test_equal_squares_give_what_adam_without_momentum_gives():
    ours, theirs = (keras.Variable(np.ones((2, 4, 5), "float32")) for _ in range(2))
    ours.expert_rank = 2
    optimizers = FactoredAdam(0.01), keras.optimizers.Adam(0.01, beta_1=0.0)
    rng = np.random.default_rng(0)
    for _ in range(5):
        # |g_ij| = a_i · b_j is of rank one, with the same a and b in each step.
        signs = rng.choice([-1.0, 1.0], size=(2, 4, 5))
        gradient = signs * np.arange(1.0, 5)[:, None] * np.arange(2.0, 7)
        for optimizer, variable in zip(optimizers, (ours, theirs), strict=True):
            optimizer.apply([ops.convert_to_tensor(gradient, "float32")], [variable])
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.tensorflow("JAX has no slices")
@pytest.mark.parametrize("expert_parameters", [None, ["variable"]], ids=["adam", "factored"])
def test_slices_of_an_embedding_count_as_their_sum(expert_parameters):
    import tensorflow as tf

    # Row 0 twice: its gradient is 3, and the square of that 9, not 1 + 4.
    slices = tf.IndexedSlices(tf.constant([[1.0], [2.0], [4.0]]), tf.constant([0, 0, 2]), (3, 1))
    after = []
    for gradient in (slices, tf.constant([[3.0], [0.0], [4.0]])):
        variable = keras.Variable(np.zeros((3, 1), "float32"), name="variable")
        optimizer = make_optimizer(expert_parameters=expert_parameters)
        optimizer.apply([gradient], [variable])
        optimizer.apply([tf.ones((3, 1))], [variable])
        after.append(numpy(variable))
    np.testing.assert_allclose(*after, rtol=1e-6)


def test_slots_hold_the_means_of_rows_and_of_columns():
    variables, (gradients,) = make_variables(), make_gradients(1)
    applied(optimizer := make_optimizer(), variables, [gradients])
    by_name = {variable.name: numpy(variable) for variable in optimizer.variables}
    squares = (1 - BETA_2) * np.square(gradients["kernel"])
    np.testing.assert_allclose(by_name["kernel_row_means"], squares.mean(axis=2), rtol=1e-5)
    np.testing.assert_allclose(by_name["kernel_column_means"], squares.mean(axis=1), rtol=1e-5)


def test_config_round_trip():
    options = {"clipnorm": 1.0, "weight_decay": 0.1, "use_ema": True, "name": "mine"}
    optimizer = make_optimizer(expert_parameters=("a/",), **options)
    config = keras.saving.serialize_keras_object(optimizer)
    assert config["registered_name"] == "keras_moe>FactoredAdam"
    wanted = {"beta_1": BETA_1, "beta_2": BETA_2, "epsilon": EPSILON, "expert_parameters": ["a/"]}
    assert {**wanted, **options}.items() <= config["config"].items()
    again = keras.saving.deserialize_keras_object(config)
    assert again.get_config() == optimizer.get_config()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta_1": 1.0}, "`beta_1` .* below 1. Received: 1.0"),
        ({"beta_2": -0.1}, "`beta_2` .* at least 0 .*Received: -0.1"),
        ({"beta_2": "high"}, "`beta_2` .*Received: 'high'"),
        ({"epsilon": 0.0}, "`epsilon` .* above 0. Received: 0.0"),
        ({"expert_parameters": "experts"}, "list of regular expressions. Received: 'experts'"),
        ({"expert_parameters": ["("]}, r"list of regular expressions. Received: \['\('\]"),
        ({"expert_parameters": [3]}, r"list of regular expressions. Received: \[3\]"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FactoredAdam(**arguments)
