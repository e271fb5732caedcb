"""Our kernels, in a process like all the others: python -m ...workers.own <fused|unfused> [<compiled>] <threads>."""

import sys
import time
from dataclasses import replace

import torch

from fusion import gemm_chain
from scripts.testbed.memory_pool import keep_freed_memory
from scripts.testbed.own_kernels import chain_of, own, search
from scripts.testbed.peer_processes.problem import Problem
from scripts.testbed.peer_processes.serve import DeclinedError, Loaded, serve
from scripts.testbed.peer_processes.workers.pytorch import facts, loaded


def fused(problem: Problem, threads: int) -> Loaded:
    """The chain as one kernel.

    Args:
        problem: What to compute.
        threads: Cores.
    """
    start = time.perf_counter()
    found = own(chain_of(problem), threads, needs=frozenset("ABD" if problem.backward else ""))
    planned_s = time.perf_counter() - start
    ready = loaded(lambda A, B, D: found.run({"A": A, "B": B, "D": D}), problem)
    start = time.perf_counter()
    ready.run()  # which loads the kernel
    return replace(ready, how=found.text, planned_s=planned_s + time.perf_counter() - start)


def unfused(problem: Problem, threads: int) -> Loaded:
    """A kernel of the same kind for each product, with the value between them written out.

    Args:
        problem: What to compute.
        threads: Cores.
    """
    if problem.kind != "chain" or problem.backward:
        raise DeclinedError("two products alone")
    batch = problem.batch if problem.batch > 1 else None
    first = own(gemm_chain(M=problem.M, N=problem.N, K=problem.K, batch=batch, dtype=problem.dtype), threads)
    second = own(gemm_chain(M=problem.M, N=problem.H, K=problem.N, batch=batch, dtype=problem.dtype), threads)
    both = loaded(lambda A, B, D: second.run({"A": first.run({"A": A, "B": B}), "B": D}), problem)
    return replace(both, how=f"{first.text}; {second.text}")


VARIANTS = {"fused": fused, "unfused": unfused}

if __name__ == "__main__":
    variant, compiled, threads = sys.argv[1], sys.argv[2:-1], int(sys.argv[-1])
    torch.set_num_threads(threads)
    search(compiled)
    keep_freed_memory()
    serve(lambda problem: VARIANTS[variant](problem, threads), facts)
