"""What replicas tell each other in the middle of a step.

With JAX a replica is a position along the batch axis of the mesh of `keras.distribution`. A layer
sees the batch of all replicas and all experts, and XLA divides what it computes. It would have
every replica compute all experts. So `on_replicas` takes a function apart by hand. Inside of it all
replicas call the other functions, in the same order; outside there is nobody to talk to.
"""

import jax
import jax.numpy as jnp
import keras
from jax.sharding import PartitionSpec

from keras_moe.backend.given import Given
from keras_moe.backend.jax.layouts import layout_of


def num_replicas():
    """R, inside of replicas and outside."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return 1
    mesh = distribution.device_mesh
    return mesh.shape[mesh.axis_names.index(distribution.batch_dim_name)]


def of_replica(seed):
    """The seed: noise is drawn for the batch of all replicas."""
    return seed


def check_can_communicate():
    """Replicas always can."""


def total_size(size):
    """The size: outside of replicas it is that of all."""
    return size


def static_shapes():
    """Whether no shape may depend on the data: always."""
    return True


def on_replicas(function, examples, variables):
    """Calls a function on all replicas.

    Args:
        function: Called with a replica's part of `examples`; inside, `variables` have that
            replica's rows. It must not close over tensors.
        examples: Structure of tensors [T, ...]. Where R doesn't divide T, zeros follow.
        variables: List of variables, divided along their first axis.

    Returns:
        What it returns: a tensor with an entry for each example, and a scalar that is the same on
        all replicas, or `None`.

    Raises:
        RuntimeError: If a variable isn't divided among these replicas, or the function changes one.
    """
    for variable in variables:
        _check_divided(variable)

    def on_replica(examples, values):
        with Given(variables, values) as given:
            result = function(examples)
        now = [given.state_mapping.get(id(variable)) for variable in variables]
        same = all(x is y for x, y in zip(now, values, strict=True))
        if len(given.state_mapping) > len(variables) or not same:
            raise RuntimeError(
                "Experts that are divided among replicas can't change variables while they "
                "compute, as the state of a seed: each replica would change it its own way. "
                f"Received: experts with the variables {[v.path for v in variables]}"
            )
        return result

    values = [variable.value for variable in variables]
    return _mapped(on_replica, examples, values, (_along_batch(), PartitionSpec()))


def each_its_own(function, x):
    """Calls a function of each example by itself, on the replica that has the example.

    What XLA knows no way to divide it would have all replicas compute of all examples.

    Args:
        function: Of a tensor [T, ...]; it returns tensors with an entry for each example.
        x: Tensor [T, ...].

    Returns:
        What it returns.
    """
    if num_replicas() == 1 or _on_replica():
        return function(x)
    return _mapped(lambda x, _: function(x), x, [], _along_batch())


def _mapped(function, examples, values, out_specs):
    """A function of examples and values on all replicas; its results without what is padded."""
    number = jax.tree.leaves(examples)[0].shape[0]
    mapped = jax.shard_map(
        function,
        mesh=keras.distribution.distribution().device_mesh.backend_mesh,
        in_specs=_along_batch(),
        out_specs=out_specs,
        check_vma=False,
    )
    # Compiled as a whole also where it is called eagerly.
    results = jax.jit(mapped)(jax.tree.map(_divided, examples), values)
    return jax.tree.map(lambda x: x[:number] if x.ndim else x, results)


def _check_divided(variable):
    """Raises RuntimeError unless a variable is divided among the replicas that are here."""
    distribution, layout = keras.distribution.distribution(), layout_of(variable)
    mesh = distribution.device_mesh.backend_mesh
    if layout.axes[:1] != (_axis(),) or layout.device_mesh.backend_mesh != mesh:
        raise RuntimeError(
            "Experts are divided among replicas as their variables are made, so the distribution "
            "must be there before: call `keras.distribution.set_distribution(distribution)`, then "
            f"build the model. Received: {variable.path!r}, which is not divided among the "
            f"{num_replicas()} replicas of {distribution}"
        )


def _divided(x):
    """A tensor [T, ...] along the batch axis, with zeros behind it so that R divides it."""
    missing = -x.shape[0] % num_replicas()
    if missing:
        x = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
    mesh = keras.distribution.distribution().device_mesh
    layout = keras.distribution.TensorLayout((_axis(), *[None] * (x.ndim - 1)), mesh)
    return keras.distribution.distribute_tensor(x, layout)


def in_turn(rounds, play, y):
    """Plays `rounds` rounds of y = play(i, y)."""
    return jax.lax.fori_loop(0, rounds, play, y)


def all_to_all(x):
    """Sends x[r] to replica r.

    Args:
        x: Tensor [R, ...].

    Returns:
        Tensor [R, ...], entry r from replica r. Its gradient travels the same way back.
    """
    return jax.lax.all_to_all(x, _axis(), split_axis=0, concat_axis=0)


def all_sum(x):
    """The sum over all replicas; outside of replicas, where it is that already, what it is."""
    return jax.lax.psum(x, _axis()) if _on_replica() else x


def all_max(x):
    """The maximum over all replicas; it has no gradient."""
    return jax.lax.pmax(x, _axis())


def _axis():
    return keras.distribution.distribution().batch_dim_name


def _along_batch():
    return PartitionSpec(_axis())


def _on_replica():
    return num_replicas() > 1 and _axis() in jax.sharding.get_abstract_mesh().manual_axes


def is_chief(strategy=None):
    """Whether this process is the one that writes the files.

    Args:
        strategy: Without effect.

    Returns:
        A bool. With one process it is true.
    """
    return jax.process_index() == 0
