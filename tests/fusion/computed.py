"""Tensors for a chain, and what a function makes of them: the output and every gradient."""

import torch

from fusion.plan import Causal

ORDERS = 64  # of the sums in an unfused computation, at most: the first ones mostly show errors as large
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def draw(chain, dtype=torch.float64):
    tensors = {}
    for name in (tensor.name for tensor in chain.inputs):
        if name in chain.boolean_inputs:
            tensors[name] = torch.rand(chain.shape(name)) < 0.7
        else:
            tensors[name] = torch.randn(chain.shape(name), dtype=torch.float64).to(DTYPES[chain.dtype]).to(dtype)
    return tensors


def upstream(output, dtype, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(dtype)


def results(function, tensors, dtype, seed=1):
    """The output and every gradient by name, for one fixed upstream gradient."""
    leaves = {
        name: t if t.dtype == torch.bool else t.to(dtype, copy=True).requires_grad_() for name, t in tensors.items()
    }
    output = function(leaves)
    output.backward(upstream(output, dtype, seed))
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.dtype != torch.bool}
    return {"output": output.detach(), **gradients}


def orders(chain, seed):
    """Letter -> its entries shuffled; letters of a causal mask keep their order, which means something."""
    generator = torch.Generator().manual_seed(seed)
    fixed = {letter for stage in chain.stages if isinstance(stage, Causal) for letter in (stage.row, stage.column)}
    return {x.name: torch.randperm(x.size, generator=generator) for x in chain.dims if x.name not in fixed}


def shuffled(tensor, letters, orders):
    for axis, letter in enumerate(letters):
        tensor = tensor.index_select(axis, orders[letter]) if letter in orders else tensor
    return tensor


def back(orders):
    return {letter: order.argsort() for letter, order in orders.items()}


def in_another_order(function, chain, seed):
    """The function of a chain's tensors with its sums in another order: every letter's entries are shuffled."""
    order = orders(chain, seed)

    def of_shuffled(tensors):
        given = {name: shuffled(tensor, chain.tensors[name], order) for name, tensor in tensors.items()}
        return shuffled(function(given), chain.tensors[chain.output], back(order))

    return of_shuffled
