"""Who is measured on a graphics card.

Another framework adds its module, its card, its contenders.
"""

from contenders import JAX, TENSORFLOW, TORCH
from measure import Contender

# The class in `cards.py` of each framework, in the order in which they take the card.
CARDS = {TENSORFLOW: "TensorFlow", JAX: "Jax", TORCH: "Torch"}

CAPACITY = {"capacity_factor": 1.25, "jit": True}
# Enough for an even load of 1024 rows per expert: their standard deviation is 3 % of that.
LITTLE = {"capacity_factor": 1.1}

# The first of each framework is what its others are multiples of.
LAYERS = [
    Contender("dense", TENSORFLOW, "dense", "two layers, K·F hidden units"),
    Contender("keras_moe", TENSORFLOW, "sparse_moe", "noise, both losses, nothing dropped"),
    Contender(
        "keras_moe, capacity 1.25, XLA",
        TENSORFLOW,
        "sparse_moe",
        "in training drops beyond 1.25·K·T/N examples per expert",
        CAPACITY,
    ),
    Contender(
        "keras_moe, capacity 1.1, XLA",
        TENSORFLOW,
        "sparse_moe",
        "in training drops beyond 1.1·K·T/N examples per expert",
        {**LITTLE, "jit": True},
    ),
    Contender("dense, XLA", TENSORFLOW, "dense", "as dense", {"jit": True}),
    Contender("dense, JAX", JAX, "dense", "as dense"),
    Contender(
        "keras_moe, JAX, capacity 1.1",
        JAX,
        "sparse_moe",
        "in training drops beyond 1.1·K·T/N examples per expert",
        LITTLE,
    ),
    Contender(
        "keras_moe, JAX, capacity 1.25",
        JAX,
        "sparse_moe",
        "in training drops beyond 1.25·K·T/N examples per expert",
        {"capacity_factor": 1.25},
    ),
    Contender("keras_moe, JAX", JAX, "sparse_moe", "noise, both losses, nothing dropped"),
    Contender(
        "ragged_dot, JAX",
        JAX,
        "ragged_dot",
        "the experts' products alone: no gating, rows sorted before",
    ),
    Contender(
        "tokamax, JAX",
        JAX,
        "tokamax",
        "the experts' products alone: no gating, rows sorted before",
    ),
    Contender("dense, PyTorch", TORCH, "dense", "as dense"),
    Contender(
        "grouped_mm, PyTorch",
        TORCH,
        "grouped_mm",
        "the experts' products alone: no gating, rows sorted before",
    ),
    Contender(
        "transformers Mixtral, grouped_mm",
        TORCH,
        "mixtral",
        "gated experts; no noise, no losses",
        {"implementation": "grouped_mm"},
    ),
]
STEPS = [
    Contender("dense", TENSORFLOW, "dense", "trained by Adam"),
    Contender(
        "keras_moe, FactoredAdam",
        TENSORFLOW,
        "sparse_moe",
        "nothing dropped",
        {"optimizer": "FactoredAdam"},
    ),
    Contender(
        "keras_moe, capacity 1.25, XLA, FactoredAdam",
        TENSORFLOW,
        "sparse_moe",
        "drops beyond 1.25·K·T/N examples per expert",
        {"optimizer": "FactoredAdam", **CAPACITY},
    ),
    Contender("dense, JAX", JAX, "dense", "trained by Adam"),
    Contender(
        "keras_moe, JAX, FactoredAdam",
        JAX,
        "sparse_moe",
        "nothing dropped",
        {"optimizer": "FactoredAdam"},
    ),
]


def of(case):
    """The contenders that do the work of a case: PyTorch's have one dtype, and no optimizer."""
    contenders = STEPS if case.work == "step" else LAYERS
    mixed = case.dtype != case.compute_dtype
    return [each for each in contenders if each.module != TORCH or not mixed]
