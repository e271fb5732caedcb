"""AMD's zentorch, as a compiler's back end or by its operators: python -m ...workers.zen <threads>."""

import sys
from collections.abc import Callable

import torch
import zentorch
from torch import Tensor

from scripts.testbed.memory_pool import keep_freed_memory
from scripts.testbed.peer_processes.problem import Problem
from scripts.testbed.peer_processes.serve import DeclinedError, Loaded, fastest, serve
from scripts.testbed.peer_processes.workers.pytorch import Function, facts, formula, loaded, sdpa


def load(problem: Problem) -> Loaded:
    """The best of its ways.

    Args:
        problem: What to compute.
    """
    if problem.backward:
        raise DeclinedError("inference alone")

    def compiled(function: Function) -> Callable[[], Loaded]:
        def make() -> Loaded:
            torch._dynamo.reset()
            return loaded(torch.compile(function, backend="zentorch", dynamic=False), problem)

        return make

    ways = {"compiled": compiled(formula(problem)), "operators": lambda: loaded(_operators(problem), problem)}
    if problem.kind == "attention":
        ways["compiled sdpa"] = compiled(sdpa(problem))
    return fastest(ways)


def _operators(problem: Problem) -> Function:
    ops = torch.ops.zentorch
    if problem.kind == "chain":
        product = ops.zentorch_mm if problem.batch == 1 else ops.zentorch_bmm
        return lambda A, B, D: product(product(A, B), D)

    def attention(A: Tensor, B: Tensor, D: Tensor) -> Tensor:
        E: Tensor = ops.zentorch_sdpa(A[None], B[None], D[None], is_causal=problem.causal, scale=problem.scale)[0][0]
        return E

    return attention


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    keep_freed_memory()
    serve(load, lambda: {"zentorch": zentorch.__version__, **facts()})
