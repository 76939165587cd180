"""The contenders that run on TensorFlow: the dense layers, keras_moe, and other implementations."""

import importlib.util
import itertools
import math
import sys
import types

import keras
import tensorflow as tf
from cases import batches, gate_kernels

import keras_moe


def dense(case, jit=False):
    """Two dense layers with the operations of the K experts of an example."""
    options = {"use_bias": False, "dtype": case.dtype}
    hidden = keras.layers.Dense(case.k * case.hidden_units, activation="relu", **options)
    layers = keras.Sequential([hidden, keras.layers.Dense(case.width, **options)])
    layers.build((None, case.width))
    return _step(case, layers, layers.trainable_variables, optimizer="Adam", jit=jit)


def weight_traffic(case):
    """All that a step must move: reads the experts' weights twice, writes as much once."""
    shapes = (
        [case.num_experts, case.width, case.hidden_units],
        [case.num_experts, case.hidden_units, case.width],
    )
    weights = [tf.Variable(tf.zeros(shape)) for shape in shapes]

    @tf.function(input_signature=[tf.TensorSpec([])])
    def step(factor):
        return [(tf.reduce_sum(weight), weight * factor) for weight in weights]

    factor = tf.constant(2.0)
    return lambda: step(factor)


def sparse_moe(case, optimizer=None, jit=False, **options):
    """`SparseMoE` or `HierarchicalMoE`, with further options of it, noise and losses included."""
    options["dtype"] = case.dtype
    if case.groups > 1:
        layer = keras_moe.HierarchicalMoE(
            case.groups,
            case.num_experts // case.groups,
            case.hidden_units,
            (math.isqrt(case.k), math.isqrt(case.k)),
            **options,
        )
        names = ["primary", "secondary"]
    else:
        layer = keras_moe.SparseMoE(case.num_experts, case.hidden_units, case.k, **options)
        names = ["gate_kernel"]
    layer.build((None, case.width))
    for name, kernel in zip(names, gate_kernels(case), strict=True):
        getattr(layer.gating, name).assign(kernel)

    def call(x, training):  # Exported models leave `training` out, and so the balance's metrics.
        return layer(x, training=training or None)

    return _step(case, call, layer.trainable_variables, lambda: layer.losses, optimizer, jit)


def tensor2tensor(case):
    """`expert_utils.local_moe`, the original, which was written for TensorFlow 1."""
    # The modules around it import these, and it needs none of them.
    for name in ("tensorflow_addons", "tensorflow_probability", "tf_slim"):
        sys.modules[name] = types.ModuleType(name)
    from tensor2tensor.utils import expert_utils

    expert = expert_utils.ffn_expert_fn(case.width, [case.hidden_units], case.width)
    # All but the first are of another gating, which creates a variable, "means", all the same.
    hparams = types.SimpleNamespace(
        gating_type="topk", z_size=1, num_residuals=1, num_blocks=1, hidden_size=1, ema=False
    )

    def call(x, upstream):
        training = case.work != "forward"
        y, loss = expert_utils.local_moe(
            x, training, expert, case.num_experts, case.k, hparams=hparams
        )
        if not training:
            return y
        weights = [v for v in tf.compat.v1.trainable_variables() if "means" not in v.name]
        gradients = tf.gradients([y, loss], [x, *weights], [upstream, tf.ones([])])
        return y, [tf.convert_to_tensor(gradient) for gradient in gradients]

    step = tf.compat.v1.wrap_function(call, _signature(case))
    (gate_kernel,) = (v for v in step.variables if "w_gate" in v.name)
    gate_kernel.assign(gate_kernels(case)[0])
    return _on_batches(case, step)


def tf_models(case):
    """`MoeLayer` with expert choice, of tf-models-official."""
    if case.k * case.examples < case.num_experts:
        raise NotImplementedError("each expert chooses an example: too few of them")
    # Their own __init__ files import much that needs another TensorFlow.
    for name in ("modeling", "nlp", "nlp.modeling", "nlp.modeling.layers"):
        spec = importlib.util.find_spec(f"official.{name}")
        sys.modules[spec.name] = package = types.ModuleType(spec.name)
        package.__path__ = spec.submodule_search_locations
    from official.nlp.modeling.layers import moe

    layer = moe.MoeLayer(
        moe.FeedForwardExperts(case.num_experts, case.hidden_units, activation=tf.nn.relu),
        moe.ExpertsChooseMaskedRouter(case.num_experts, export_metrics=False),
        train_capacity_factor=case.k,
        eval_capacity_factor=case.k,
    )

    def call(x, training):
        return layer(x[None], training=training)[0]

    call(tf.zeros([case.examples, case.width]), training=True)  # Builds it.
    layer._router.router_weights.kernel.assign(gate_kernels(case)[0])
    return _step(case, call, layer.trainable_variables)


def keras_hub(case):
    """The mixture of Qwen3-MoE, of keras-hub."""
    from keras_hub.src.models.qwen3_moe.qwen3_moe_decoder import Qwen3SparseMoeBlock

    block = Qwen3SparseMoeBlock(
        case.width, case.gated_hidden_units, case.num_experts, case.k, norm_top_k_prob=True
    )
    block.build((1, case.examples, case.width))
    block._sparse_feedforward_gate_dense.kernel.assign(gate_kernels(case)[0])

    def call(x, training):
        return block(x[None], training=training)[0][0]

    return _step(case, call, block.trainable_variables, lambda: block.losses)


def _step(case, layer, weights, losses=list, optimizer=None, jit=False):
    """Makes the step of a layer.

    Args:
        case: A `Case`.
        layer: Function of x and `training`.
        weights: Its variables.
        losses: Function that returns the losses of the last call.
        optimizer: Name of the optimizer of a training step, in `keras_moe.optimizers` or Keras.
        jit: Whether XLA compiles it.

    Returns:
        A function without arguments.
    """
    if case.work == "step":
        optimizer = _optimizer(optimizer)
        optimizer.build(weights)

    # Whatever it returns has to be computed.
    @tf.function(input_signature=_signature(case), jit_compile=jit or None)
    def step(x, upstream):
        if case.work == "forward":
            return layer(x, training=False)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
            outputs = [y, *losses()]
        upstreams = [upstream, *(tf.ones([]) for _ in outputs[1:])]
        of_x, *of_weights = tape.gradient(outputs, [x, *weights], upstreams)
        if case.work == "gradients":
            return y, of_x, of_weights
        optimizer.apply(of_weights, weights)
        return y, of_x

    return _on_batches(case, step)


def _optimizer(name):
    if name == "FactoredAdam":
        from keras_moe import optimizers

        return optimizers.FactoredAdam()
    return keras.optimizers.get(name)


def _signature(case):
    return [tf.TensorSpec([case.examples, case.width], case.compute_dtype)] * 2


def _on_batches(case, step):
    """A function without arguments that takes the step on the next batch."""
    pairs = [tuple(tf.cast(a, case.compute_dtype) for a in pair) for pair in batches(case)]
    turns = itertools.cycle(pairs)
    return lambda: step(*next(turns))
