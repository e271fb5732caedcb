"""Tensors for a chain, and what a function makes of them: the output and every gradient."""

import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def draw(chain, dtype=torch.float64):
    tensors = {}
    for name in (tensor.name for tensor in chain.inputs):
        if name in chain.boolean_inputs:
            tensors[name] = torch.rand(chain.shape(name)) < 0.7
        else:
            tensors[name] = torch.randn(chain.shape(name), dtype=torch.float64).to(DTYPES[chain.dtype]).to(dtype)
    return tensors


def upstream(output, dtype):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(dtype)


def results(function, tensors, dtype):
    """The output and every gradient by name, for one fixed upstream gradient."""
    leaves = {
        name: t if t.dtype == torch.bool else t.to(dtype, copy=True).requires_grad_() for name, t in tensors.items()
    }
    output = function(leaves)
    output.backward(upstream(output, dtype))
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.dtype != torch.bool}
    return {"output": output.detach(), **gradients}
