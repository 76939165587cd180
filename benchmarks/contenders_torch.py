"""The contenders that run on PyTorch, on its GPU where it has one."""

import itertools
import os

import numpy as np
import torch
from cases import batches, gate_kernels

torch.set_num_threads(os.cpu_count())
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.set_default_device(DEVICE)
torch.backends.cuda.matmul.allow_tf32 = True  # TensorFlow's default.


def dense(case):
    """Two dense layers with the operations of the K experts of an example."""
    hidden = torch.nn.Linear(case.width, case.k * case.hidden_units, bias=False)
    output = torch.nn.Linear(case.k * case.hidden_units, case.width, bias=False)
    layers = torch.nn.Sequential(hidden, torch.nn.ReLU(), output)
    return _step(case, layers, lambda x: [layers(x)])


def mixtral(case, implementation):
    """The mixture of Mixtral, of transformers."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=case.width,
        intermediate_size=case.gated_hidden_units,
        num_local_experts=case.num_experts,
        num_experts_per_tok=case.k,
        hidden_act="relu",
        experts_implementation=implementation,
    )
    block = MixtralSparseMoeBlock(config)
    for weight in block.experts.parameters():
        torch.nn.init.xavier_uniform_(weight)
    with torch.no_grad():
        block.gate.weight.copy_(torch.from_numpy(gate_kernels(case)[0].T))
    return _step(case, block, lambda x: [block(x[None])])


def grouped_mm(case):
    """The products of the experts alone, by PyTorch's grouped product: the rows lie sorted."""
    rows = np.random.default_rng(3).multinomial(
        case.k * case.examples, np.full(case.num_experts, 1 / case.num_experts)
    )
    ends = torch.tensor(rows.cumsum(), dtype=torch.int32)
    shapes = [(case.hidden_units, case.width), (case.width, case.hidden_units)]
    kernels = torch.nn.ParameterList(torch.empty(case.num_experts, *shape) for shape in shapes)
    for kernel in kernels:
        torch.nn.init.xavier_uniform_(kernel)

    def call(x):
        first, second = (kernel.transpose(1, 2) for kernel in kernels)
        hidden = torch.relu(torch.nn.functional.grouped_mm(x, first, offs=ends))
        return [torch.nn.functional.grouped_mm(hidden, second, offs=ends)]

    # Made where they are needed, as there are K times as many as others have examples.
    pairs = [torch.randn(2, case.k * case.examples, case.width)]
    return _step(case, kernels, call, pairs)


def mixture_of_experts(case):
    """`MoE` or `HeirarchicalMoE` of lucidrains' mixture-of-experts, always top-2.

    For K = 4 it gets half the experts of twice the hidden units: the same weights and operations.
    """
    from mixture_of_experts import HeirarchicalMoE, MoE

    second = {"second_policy_train": "all", "second_policy_eval": "all"}
    capacity = {"capacity_factor_train": 2.0, "capacity_factor_eval": 2.0}
    kernels = gate_kernels(case)
    if case.groups > 1:
        if case.k != 4:
            raise NotImplementedError("top-2 at both levels, so K = 4")
        sizes = (case.groups, case.num_experts // case.groups)
        layer = HeirarchicalMoE(case.width, sizes, case.hidden_units, **second, **capacity)
        gates = [layer.gate_outer, layer.gate_inner]
    else:
        if case.k % 2 or case.num_experts % (case.k // 2):
            raise NotImplementedError("top-2 alone")
        merged = case.k // 2
        layer = MoE(
            case.width,
            case.num_experts // merged,
            case.hidden_units * merged,
            **second,
            **capacity,
        )
        gates = [layer.gate]
    with torch.no_grad():
        for gate, kernel in zip(gates, kernels, strict=True):
            gate.w_gating.copy_(torch.from_numpy(kernel)[..., : gate.w_gating.shape[-1]])
    return _step(case, layer, lambda x: layer(x[None]))


def _step(case, module, call, pairs=None):
    """A function without arguments that computes the next batch.

    Args:
        case: A `Case`.
        module: The module, for its parameters and its mode.
        call: Function from x to a list of y and the losses.
        pairs: List of pairs of x and the upstream gradient; `None`: those of the case.
    """
    if case.dtype != case.compute_dtype:
        raise NotImplementedError("its weights have the dtype of the products")
    if case.work == "step":
        raise NotImplementedError("no optimizer")
    dtype = getattr(torch, case.dtype)
    module.to(dtype).train(case.work != "forward")
    pairs = pairs or [map(torch.from_numpy, pair) for pair in batches(case)]
    turns = itertools.cycle([[each.to(DEVICE, dtype) for each in pair] for pair in pairs])

    @torch.inference_mode()
    def forward():
        return call(next(turns)[0])

    def gradients():
        x, upstream = next(turns)
        x.requires_grad_()
        outputs = call(x)
        upstreams = [upstream.reshape(outputs[0].shape), *(None for _ in outputs[1:])]
        return outputs, torch.autograd.grad(outputs, [x, *module.parameters()], upstreams)

    return forward if case.work == "forward" else gradients
