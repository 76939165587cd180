"""A whole training step of a mixture, for what XLA makes of it."""

import jax

from keras_moe import SparseMoE
from keras_moe.optimizers import FactoredAdam


def compiled_step(num_experts, hidden_units, k, examples, width, device=None):
    """Compiles a step that writes new weights over the old ones, and hands on a gradient of x."""
    layer, optimizer = SparseMoE(num_experts, hidden_units, k, seed=0), FactoredAdam()
    layer.build((None, width))
    optimizer.build(layer.trainable_variables)

    def train(state, x):
        weights, others, slots = state

        def loss(weights, x):
            y, new, losses = layer.stateless_call(
                weights, others, x, training=True, return_losses=True
            )
            return (y**2).mean() + sum(losses), new

        (of_weights, of_x), others = jax.grad(loss, (0, 1), has_aux=True)(weights, x)
        weights, slots = optimizer.stateless_apply(slots, of_weights, weights)
        return (weights, others, slots), of_x

    sharding = device and jax.sharding.SingleDeviceSharding(device)

    def spec(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    parts = layer.trainable_variables, layer.non_trainable_variables, optimizer.variables
    state = [[spec(variable.value) for variable in part] for part in parts]
    x = spec(jax.ShapeDtypeStruct((examples, width), "float32"))
    return jax.jit(train, donate_argnums=0).lower(state, x).compile()
