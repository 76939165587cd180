"""Who is measured, and how their work differs.

Left out: davidmrau/mixture-of-experts, of which there is no package, and the Switch Transformer
example of keras.io, which is none.
"""

from measure import Contender

TENSORFLOW, TORCH, JAX = "contenders_tensorflow", "contenders_torch", "contenders_jax"

DENSE = Contender("dense", TENSORFLOW, "dense", "two layers, K·1024 hidden units; trained by Adam")

OTHERS = [
    Contender("keras_moe", TENSORFLOW, "sparse_moe", "noise, both losses, nothing dropped"),
    Contender(
        "original (tensor2tensor)",
        TENSORFLOW,
        "tensor2tensor",
        "noise (also in inference), both losses, nothing dropped",
    ),
    Contender(
        "transformers Mixtral, grouped_mm",
        TORCH,
        "mixtral",
        "gated experts; no noise, no losses",
        {"implementation": "grouped_mm"},
    ),
    Contender(
        "transformers Mixtral, eager",
        TORCH,
        "mixtral",
        "gated experts; no noise, no losses",
        {"implementation": "eager"},
    ),
    Contender(
        "tf-models-official MoeLayer",
        TENSORFLOW,
        "tf_models",
        "each expert chooses K·T/N examples; biases; no noise, no losses",
    ),
    Contender(
        "mixture-of-experts (lucidrains)",
        TORCH,
        "mixture_of_experts",
        "drops beyond K·T/N examples per expert; K = 4 flat: top-2 of N/2 experts twice as wide; "
        "no noise, one loss",
    ),
    Contender(
        "keras-hub Qwen3-MoE",
        TENSORFLOW,
        "keras_hub",
        "every expert computes every example; gated experts; no noise, one loss",
    ),
    Contender("dense, PyTorch", TORCH, "dense", "as dense"),
    Contender("dense, JAX", JAX, "dense", "as dense"),
    Contender("keras_moe, JAX", JAX, "sparse_moe", "noise, both losses, nothing dropped"),
    Contender(
        "moving the weights alone",
        TENSORFLOW,
        "weight_traffic",
        "reads all experts' weights twice, writes as many bytes once; no operations",
    ),
    Contender(
        "keras_moe, FactoredAdam",
        TENSORFLOW,
        "sparse_moe",
        "noise, both losses, nothing dropped",
        {"optimizer": "FactoredAdam"},
    ),
    Contender(
        "keras_moe, JAX, FactoredAdam",
        JAX,
        "sparse_moe",
        "noise, both losses, nothing dropped",
        {"optimizer": "FactoredAdam"},
    ),
    Contender(
        "keras_moe, Adam",
        TENSORFLOW,
        "sparse_moe",
        "noise, both losses, nothing dropped",
        {"optimizer": "Adam"},
    ),
]
