"""The contenders that run on JAX: the dense layers and keras_moe, compiled as Keras does it."""

import itertools
import os

os.environ["KERAS_BACKEND"] = "jax"  # Each contender has a process of its own.

import jax
import jax.numpy as jnp
import keras
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


def _step(case, layer, optimizer):
    """Makes the step of a layer.

    Args:
        case: A `Case`.
        layer: A built layer.
        optimizer: Name of the optimizer of a training step, in `keras_moe.optimizers` or Keras.

    Returns:
        A function without arguments.
    """
    if case.work == "step":
        optimizer = _optimizer(optimizer)
        optimizer.build(layer.trainable_variables)

    def forward(weights, others, x, upstream):
        y, others, losses = layer.stateless_call(
            weights, others, x, training=True, return_losses=True
        )
        # Its gradients are those of y with respect to the upstream gradient, and of the losses.
        return jnp.sum(y * upstream) + sum(losses), (y, others)

    # Arguments that are not used again give their memory to the results, as in Keras' trainer.
    def step(state, x, upstream):
        weights, others, slots = state
        if case.work == "forward":
            y, others = layer.stateless_call(weights, others, x, training=False)
            return y, (weights, others, slots)
        gradients = jax.grad(forward, argnums=(0, 2), has_aux=True)
        (of_weights, of_x), (y, others) = gradients(weights, others, x, upstream)
        if case.work == "gradients":
            return (y, of_x, of_weights), (weights, others, slots)
        weights, slots = optimizer.stateless_apply(slots, of_weights, weights)
        return (y, of_x), (weights, others, slots)

    step = jax.jit(step, donate_argnums=0)
    layers_own = (layer.trainable_variables, layer.non_trainable_variables)
    slots = optimizer.variables if case.work == "step" else []
    state = [[variable.value for variable in part] for part in (*layers_own, slots)]
    pairs = [tuple(jnp.asarray(a, case.compute_dtype) for a in pair) for pair in batches(case)]
    turns = itertools.cycle(pairs)

    def run():
        nonlocal state
        results, state = step(state, *next(turns))
        return jax.block_until_ready((results, state))[0]

    return run


def _optimizer(name):
    if name == "FactoredAdam":
        from keras_moe import optimizers

        return optimizers.FactoredAdam()
    return keras.optimizers.get(name)
