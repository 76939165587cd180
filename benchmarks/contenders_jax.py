"""The contenders that run on JAX: the dense layers, keras_moe, and bare grouped products."""

import os

os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # Else the peak of memory tells nothing.

import functools
import itertools

import jax
import jax.numpy as jnp
import keras
import numpy as np
from cases import batches, gate_kernels

import keras_moe


def dense(case):
    """Two dense layers with the operations of the K experts of an example."""
    options = {"use_bias": False, "dtype": case.dtype}
    hidden = keras.layers.Dense(case.k * case.hidden_units, activation="relu", **options)
    layers = keras.Sequential([hidden, keras.layers.Dense(case.width, **options)])
    layers.build((None, case.width))
    return _step(case, layers, "Adam")


def sparse_moe(case, optimizer=None, **options):
    """`SparseMoE`, with further options of it, noise and losses included."""
    if case.groups > 1:
        raise NotImplementedError("measured with TensorFlow alone")
    layer = keras_moe.SparseMoE(
        case.num_experts, case.hidden_units, case.k, dtype=case.dtype, **options
    )
    layer.build((None, case.width))
    layer.gating.gate_kernel.assign(gate_kernels(case)[0])
    return _step(case, layer, optimizer)


def ragged_dot(case):
    """The products of the experts alone, by JAX's own grouped product: the rows lie sorted."""
    return _products(case, jax.lax.ragged_dot)


def tokamax(case):
    """The same by tokamax, OpenXLA's library of kernels."""
    import tokamax

    return _products(case, tokamax.ragged_dot)


def _products(case, product):
    if case.work == "step":
        raise NotImplementedError("no optimizer")
    if case.dtype != case.compute_dtype:
        raise NotImplementedError("its weights have the dtype of the products")
    rng = np.random.default_rng(3)
    num_rows = case.k * case.examples
    rows_per_expert = rng.multinomial(num_rows, np.full(case.num_experts, 1 / case.num_experts))
    rows_per_expert = jnp.asarray(rows_per_expert, "int32")
    shapes = [(case.width, case.hidden_units), (case.hidden_units, case.width)]
    keys = iter(jax.random.split(jax.random.key(0), 4))

    def random(*shape):
        return jax.random.normal(next(keys), shape, case.dtype)

    kernels = [random(case.num_experts, *shape) / shape[0] ** 0.5 for shape in shapes]

    def call(x, kernels):
        hidden = jax.nn.relu(product(x, kernels[0], rows_per_expert))
        return [product(hidden, kernels[1], rows_per_expert)]

    # Made where they are needed, as there are K times as many as others have examples.
    pairs = [(random(num_rows, case.width), random(num_rows, case.width))]
    return _compute(case, call, kernels, pairs)


def _step(case, layer, optimizer):
    """Makes the step of a layer: a function without arguments."""
    weights = [variable.value for variable in layer.trainable_variables]
    others = [variable.value for variable in layer.non_trainable_variables]
    if case.work == "step":
        return _train(case, layer, optimizer, weights, others)

    def call(x, weights):
        if case.work == "forward":
            return layer.stateless_call(weights, others, x, training=False)[0]
        y, _, losses = layer.stateless_call(weights, others, x, training=True, return_losses=True)
        return [y, *losses]

    return _compute(case, call, weights, _pairs(case))


def _compute(case, call, weights, pairs):
    """The forward pass, or with it all gradients, of a function of x and weights."""

    @jax.jit
    def forward(weights, x, upstream):
        return call(x, weights)

    @jax.jit
    def gradients(weights, x, upstream):
        outputs, back = jax.vjp(call, x, weights)
        return outputs, back([upstream, *map(jnp.ones_like, outputs[1:])])

    step, turns = forward if case.work == "forward" else gradients, itertools.cycle(pairs)
    return _waited_for(lambda: step(weights, *next(turns)))


def _waited_for(step):
    """On CPUs the step waits for its results, as those of others do; a card is waited for later."""
    if jax.default_backend() == "gpu":
        return step
    return lambda: jax.block_until_ready(step())


def _train(case, layer, optimizer, weights, others):
    """A whole training step, which takes the state of the last one."""
    optimizer = _optimizer(optimizer)
    optimizer.build(layer.trainable_variables)

    def outputs(x, weights, others):
        y, others, losses = layer.stateless_call(
            weights, others, x, training=True, return_losses=True
        )
        return [y, *losses], others

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, x, upstream):
        weights, others, slots = state
        (y, *losses), back, others = jax.vjp(
            lambda x, weights: outputs(x, weights, others), x, weights, has_aux=True
        )
        # That of a loss comes after the output. Else XLA would copy all experts, which the step
        # writes over, for the forward pass to read.
        upstream += 0 * y
        of_x, of_weights = back([upstream, *map(jnp.ones_like, losses)])
        weights, slots = optimizer.stateless_apply(slots, of_weights, weights)
        return (weights, others, slots), (y, of_x)

    state = (weights, others, [variable.value for variable in optimizer.variables])
    turns = itertools.cycle(_pairs(case))

    def take():
        nonlocal state
        state, results = step(state, *next(turns))
        return state, results

    return _waited_for(take)


def _optimizer(name):
    if name == "FactoredAdam":
        return keras_moe.optimizers.FactoredAdam()
    return keras.optimizers.get(name)


def _pairs(case):
    return [tuple(jnp.asarray(a, case.compute_dtype) for a in pair) for pair in batches(case)]
