"""PyTorch as its users call it: python -m ...workers.pytorch <eager|out|compile|sdpa> <threads>."""

import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from scripts.testbed.memory_pool import keep_freed_memory
from scripts.testbed.peer_processes.problem import Array, Problem
from scripts.testbed.peer_processes.serve import DeclinedError, Loaded, serve

Function = Callable[..., Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def formula(problem: Problem) -> Function:
    """The problem written with torch's operations.

    Args:
        problem: What to compute.

    Returns:
        A, B, D -> E.
    """
    if problem.kind == "chain":
        return lambda A, B, D: (A @ B) @ D
    if not problem.causal:
        return lambda A, B, D: torch.softmax(A @ B.mT * problem.scale, -1) @ D
    mask = torch.full((problem.M, problem.N), -torch.inf, dtype=DTYPES[problem.dtype]).triu_(1)
    return lambda A, B, D: torch.softmax(A @ B.mT * problem.scale + mask, -1) @ D


def sdpa(problem: Problem) -> Function:
    """Attention by the library's own kernel.

    Args:
        problem: What to compute.
    """
    if problem.kind == "chain":
        raise DeclinedError("attention alone")
    return lambda A, B, D: functional.scaled_dot_product_attention(
        A[None], B[None], D[None], is_causal=problem.causal, scale=problem.scale
    )[0]


def tensors(problem: Problem) -> dict[str, Tensor]:
    """Inputs in the problem's dtype.

    Args:
        problem: What to compute.
    """
    return {name: torch.from_numpy(x).to(DTYPES[problem.dtype], copy=True) for name, x in problem.inputs().items()}


def loaded(function: Function, problem: Problem) -> Loaded:
    """A function on the problem's inputs, with gradients where they are asked for.

    Args:
        function: A, B, D -> E.
        problem: What to compute.
    """
    inputs = tensors(problem)
    operands = [inputs[name] for name in "ABD"]
    if problem.backward:
        for operand in operands:
            operand.requires_grad_()

        def run() -> tuple[Tensor, ...]:
            E = function(*operands)
            return (E, *torch.autograd.grad(E, operands, inputs["E"]))

    else:

        @torch.no_grad()
        def run() -> tuple[Tensor, ...]:
            return (function(*operands),)

    return Loaded(run=run, outputs=lambda: arrays(run()))


def arrays(found: Sequence[Tensor]) -> list[Array]:
    """Tensors as arrays in fp32.

    Args:
        found: Of any dtype.
    """
    return [np.asarray(each.detach().float().numpy()) for each in found]


def written_out(problem: Problem) -> Loaded:
    """Products into memory that is there already.

    Args:
        problem: What to compute.
    """
    if problem.kind == "attention" or problem.backward:
        return loaded(formula(problem), problem)
    inputs = tensors(problem)
    A, B, D = (inputs[name] for name in "ABD")
    C, E = A @ B, (A @ B) @ D

    @torch.no_grad()
    def run() -> None:
        torch.matmul(torch.matmul(A, B, out=C), D, out=E)

    def outputs() -> list[Array]:
        run()
        return arrays([E])

    return Loaded(run=run, outputs=outputs)


def compiled(problem: Problem) -> Loaded:
    """By torch.compile, without its search for products: that chose the library's own again, or was slower.

    Args:
        problem: What to compute.
    """
    torch._dynamo.reset()
    return loaded(torch.compile(formula(problem), fullgraph=True, dynamic=False), problem)


def facts() -> dict[str, str]:
    """Versions, and the instructions that torch and its libraries take."""
    config = torch.__config__.show().splitlines()
    names = {"Math Kernel": "mkl", "MKL-DNN": "onednn", "CPU capability": "torch_isa"}
    found = {name: line.strip(" -") for line in config for text, name in names.items() if text in line}
    return {"torch": torch.__version__, **found}


VARIANTS: dict[str, Callable[[Problem], Loaded]] = {
    "eager": lambda problem: loaded(formula(problem), problem),
    "out": written_out,
    "compile": compiled,
    "sdpa": lambda problem: loaded(sdpa(problem), problem),
}

if __name__ == "__main__":
    variant, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    if variant != "eager":  # which stands for torch as it comes
        keep_freed_memory()
    serve(VARIANTS[variant], facts)
