"""What a chip computes and holds in a training step of `tpu_models.py`, by formulas."""

import math

import tpu_models
from tpu_models import BLOCK, BLOCK_EXPERTS, BLOCK_K, BLOCK_UNITS, BLOCK_WIDTH, WORDS

from keras_moe import HierarchicalMoE
from keras_moe.models import footprint


def operations(name, model):
    """Two for each multiply-add of the forward pass, and twice as many in the backward pass."""
    if name == BLOCK:
        per_word = 4 * BLOCK_WIDTH**2 + 2 * WORDS * BLOCK_WIDTH + 2 * BLOCK_WIDTH * BLOCK_EXPERTS
        per_word += 2 * BLOCK_K * BLOCK_WIDTH * BLOCK_UNITS
    else:
        per_word = footprint(model).ops_per_timestep + model.width * tpu_models.VOCABULARY
    return 6 * _words() * per_word


def arguments(name, model, num_chips):
    """Bytes of weights and slots in float32, and of what a step learns from.

    A chip has a part of the experts and of the gatings of groups, and all else in full.
    """
    inputs = 2 * _words() * (BLOCK_WIDTH if name == BLOCK else 1)
    return 4 * (inputs + _numbers([*model.variables, *model.optimizer.variables], num_chips))


def temporaries(name, model, num_chips):
    """Bytes of all else that a chip holds when it holds most.

    That is the gradients of all that it trains, in float32; what the backward pass needs; and the
    largest of what is there for a while. The backward pass needs

    - of each word in an LSTM its gates, its memory and what it was given; in a block input, sum,
      both normalized, queries, keys, values and what attention makes of them; and K results;
    - of each place at an expert the row, the hidden units and the result. Without a capacity there
      are places for the rows of all chips;
    - the rows of the gatings of groups, in float32, with room for those of all chips, too.

    For a while there are the gradients at these places; or the logits, in float32; or the rows of
    the gatings in six parts of bfloat16, by which a product is as exact as in float32.
    """
    layer, words = model.middle, _words()
    size = 4 if layer.compute_dtype == "float32" else 2
    width, hidden = layer.experts.kernels[0].shape[1:]
    k = layer.k if isinstance(layer.k, tuple) else (layer.k,)

    choices = words * math.prod(k)
    if name == BLOCK:
        activations = 8 * words * width
    else:
        activations = sum(words * (5 * lstm.units + width) for lstm in model.lstms)
    if layer.capacity_factor is None:
        places = num_chips * choices
    else:
        places = math.ceil(layer.capacity_factor * choices)
    at_experts = places * (2 * width + hidden)
    needed = size * (activations + choices * width + at_experts)

    for_a_while = [size * at_experts]
    if name != BLOCK:
        for_a_while.append(4 * words * tpu_models.VOCABULARY)
    if isinstance(layer, HierarchicalMoE):
        at_groups = num_chips * words * k[0] * width
        needed += 4 * at_groups
        for_a_while.append(6 * 2 * at_groups)
    return 4 * _numbers(model.trainable_variables, num_chips) + needed + max(for_a_while)


def _words():
    return tpu_models.SENTENCES * WORDS


def _numbers(variables, num_chips):
    """How many a chip has of them all."""
    return sum(
        math.prod(variable.shape) // (num_chips if _is_divided(variable) else 1)
        for variable in variables
    )


def _is_divided(variable):
    return variable._layout is not None and any(variable._layout.axes)
