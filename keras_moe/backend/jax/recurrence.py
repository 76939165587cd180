"""Steps in time, one after the other."""

import jax
import jax.numpy as jnp


def over_time(step, x, states, number):
    """Takes one step for each entry of a sequence.

    Args:
        step: Function of an entry [B, ...] and the states; it returns a list of results [B, ...]
            and the next states.
        x: Tensor [B, L, ...].
        states: Structure of tensors.
        number: How many results a step has.

    Returns:
        List of the results of all steps, [B, L, ...].
    """

    def turn(states, entry):
        results, states = step(entry, states)
        return states, results

    _, made = jax.lax.scan(turn, states, jnp.swapaxes(x, 0, 1))
    return [jnp.swapaxes(results, 0, 1) for results in made]
