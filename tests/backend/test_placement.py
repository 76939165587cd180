"""What a GPU would run of the layers, and what it would have to ask the host for."""

import itertools

import pytest
import tensorflow as tf
from combinations import covering
from helpers import EVERY_LAYER, WIDTH, examples
from placement import placement

from keras_moe import HierarchicalMoE, SparseMoE
from keras_moe.gating.strictly_balanced import BalancedGating

pytestmark = pytest.mark.cpu  # On a GPU TensorFlow places what is counted here itself.

LAYERS = {
    **EVERY_LAYER,
    "hierarchical_balanced": lambda **options: HierarchicalMoE(
        2, 3, 4, gating="strictly_balanced", **options
    ),
    "biases": lambda **options: SparseMoE(5, 4, k=2, use_bias=True, activation="swiglu", **options),
    "mixed_bfloat16": lambda **options: SparseMoE(5, 4, k=2, dtype="mixed_bfloat16", **options),
    "bfloat16": lambda **options: SparseMoE(5, 4, k=2, dtype="bfloat16", **options),
    "shared": lambda **options: SparseMoE(5, 4, k=2, num_shared_experts=1, **options),
    "recompute": lambda **options: SparseMoE(5, 4, k=2, recompute=True, **options),
    "z_loss": lambda **options: SparseMoE(5, 4, k=2, router_z_loss_weight=0.1, **options),
}

# What each level of a layer asks of the host. From the GPU goes the noise's seed, of which the host
# makes a key, and, in one copy, how many places there are in how many blocks. To the GPU goes the
# key, in two parts, and whether there are further blocks. Strictly balanced gating has no noise,
# but a number of choices that depends on the batch.
FROM_GPU, TO_GPU = 2, 3
# Computing with shapes: more where the number of choices depends on the batch.
ON_HOST, ON_HOST_BALANCED = 12, 35


def made(name):
    layer = LAYERS[name]()
    layer.build((None, WIDTH))
    return layer


def step(layer):
    weights = [weight.value for weight in layer.trainable_weights]

    def gradients(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
            results = [y, *layer.losses]
        return tape.gradient(results, [x, *weights])

    return gradients


def forward(layer):
    return lambda x: layer(x, training=False)


# Whose step is made of what the steps of two others are.
LIKE_OTHERS = ("softmax", "balanced_capacity", "hierarchical_capacity", "bfloat16")
CALLS = {"step": (step, 64), "forward": (forward, 64), "one example": (forward, 1)}


@covering(
    usual=[
        *((name, "step") for name in LAYERS if name not in LIKE_OTHERS),
        *zip(LAYERS, itertools.cycle(["forward", "one example"]), strict=False),
    ],
    name=LAYERS.keys(),
    call=CALLS,
)
def test_a_layer_stays_on_the_gpu(name, call):
    layer, (make, number) = made(name), call
    found = placement(make(layer), tf.constant(examples(number)))
    assert not found.missing
    levels = 2 if isinstance(layer, HierarchicalMoE) else 1
    assert len(found.from_gpu) <= levels * FROM_GPU, found.from_gpu
    assert len(found.to_gpu) <= levels * TO_GPU, found.to_gpu
    on_host = ON_HOST_BALANCED if isinstance(layer.gating, BalancedGating) else ON_HOST
    assert len(found.on_host) <= levels * on_host, found.on_host
    assert "LoopCond" not in (found.on_host | found.on_gpu).values()


@pytest.mark.parametrize("name", ["noisy_top_k", "biases", "capacity"])
def test_one_example_asks_nothing_of_the_host(name):
    found = placement(forward(made(name)), tf.constant(examples(1)))
    assert not (found.missing or found.on_host or found.from_gpu or found.to_gpu)


def test_the_way_of_cpus_would_be_found():
    layer = made("noisy_top_k")
    found = placement(forward(layer), tf.constant(examples(64)), way=0)
    assert len(found.from_gpu) > FROM_GPU
    assert "LoopCond" in (found.on_host | found.on_gpu).values()
    found = placement(forward(layer), tf.constant(examples(1)), way=0)
    assert "SparseMatMul" in found.missing.values()
