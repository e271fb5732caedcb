"""Our kernels as the benchmarks call them: the one place that knows what makes a chain a function."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion import Chain, attention, gemm_chain
from fusion.run.autograd import apply
from fusion.run.executors import DEFAULT, executors
from fusion.run.planned import planned_executor
from fusion.run.unfused import run_unfused
from scripts.testbed.peer_processes.problem import Problem


@dataclass(frozen=True)
class Own:
    """A chain as we run it."""

    run: Callable[[Mapping[str, Tensor]], Tensor]
    """Tensors by name -> the output; differentiable."""
    text: str
    """What was chosen, or why no kernel runs and torch does instead."""


def own(chain: Chain, threads: int, *, needs: frozenset[str] = frozenset()) -> Own:
    """What runs a chain on this machine, as users get it.

    Args:
        chain: What to compute.
        threads: Cores it may use.
        needs: Names of the inputs that need a gradient.
    """
    torch.set_num_threads(threads)
    found = executors.get(DEFAULT)(chain, needs, torch.device("cpu"))
    if isinstance(found, str):
        return Own(lambda tensors: run_unfused(chain, tensors), f"torch, for {found}")
    execute = found.execute
    return Own(lambda tensors: apply(chain, tensors, execute), found.text)


def search(compiled: Sequence[str]) -> None:
    """From now on this process compiles and measures so many candidates of each search.

    Args:
        compiled: How many, as an argument of a command; empty leaves it to the library.
    """
    if compiled:
        executors.add(DEFAULT, planned_executor(compiled=int(compiled[0])))


def chain_of(problem: Problem, *, rows: range | None = None, batch: int | None = None) -> Chain:
    """A problem as a chain.

    Args:
        problem: What to compute.
        rows: Of A, where not all are wanted.
        batch: How many independent parts, where not all are wanted.
    """
    rows = range(problem.M) if rows is None else rows
    batch = problem.batch if batch is None else batch
    if problem.kind == "chain":
        lead = batch if problem.batch > 1 else None
        return gemm_chain(M=len(rows), N=problem.N, K=problem.K, H=problem.H, batch=lead, dtype=problem.dtype)
    return attention(
        M=len(rows), N=problem.N, K=problem.K, H=problem.H, heads=batch, causal=problem.causal,
        diagonal=rows.start if problem.causal else 0, dtype=problem.dtype,
    )  # fmt: skip
