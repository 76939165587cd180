"""The contenders that run on PyTorch."""

import itertools
import os

import torch
from cases import GATED_HIDDEN_UNITS, HIDDEN_UNITS, WIDTH, batches, gate_kernels

torch.set_num_threads(os.cpu_count())


def dense(case):
    """Two dense layers with the operations of the K experts of an example."""
    hidden = torch.nn.Linear(WIDTH, case.k * HIDDEN_UNITS, bias=False)
    output = torch.nn.Linear(case.k * HIDDEN_UNITS, WIDTH, bias=False)
    layers = torch.nn.Sequential(hidden, torch.nn.ReLU(), output)
    return _step(case, layers, lambda x: [layers(x)])


def mixtral(case, implementation):
    """The mixture of Mixtral, of transformers."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=WIDTH,
        intermediate_size=GATED_HIDDEN_UNITS,
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
        layer = HeirarchicalMoE(WIDTH, sizes, HIDDEN_UNITS, **second, **capacity)
        gates = [layer.gate_outer, layer.gate_inner]
    else:
        if case.k % 2 or case.num_experts % (case.k // 2):
            raise NotImplementedError("top-2 alone")
        merged = case.k // 2
        layer = MoE(
            WIDTH,
            case.num_experts // merged,
            HIDDEN_UNITS * merged,
            **second,
            **capacity,
        )
        gates = [layer.gate]
    with torch.no_grad():
        for gate, kernel in zip(gates, kernels, strict=True):
            gate.w_gating.copy_(torch.from_numpy(kernel)[..., : gate.w_gating.shape[-1]])
    return _step(case, layer, lambda x: layer(x[None]))


def _step(case, module, call):
    """A function without arguments that computes the next batch.

    Args:
        case: A `Case`.
        module: The module, for its parameters and its mode.
        call: Function from x to a list of y and the losses.
    """
    module.train(case.work != "forward")
    turns = itertools.cycle([tuple(map(torch.from_numpy, pair)) for pair in batches(case)])

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
