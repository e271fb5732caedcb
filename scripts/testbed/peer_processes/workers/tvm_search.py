"""TVM's MetaSchedule, which searches for a given time when it loads: python -m ...workers.tvm_search <s> <threads>."""

import json
import sys
import time
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tvm
from tvm import te
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule

from scripts.testbed.instructions import flags
from scripts.testbed.peer_processes.problem import Array, Problem
from scripts.testbed.peer_processes.serve import DeclinedError, Loaded, serve

BATCH = 8  # candidates that are measured together
MAX_TRIALS = 100_000
PROCESSORS = {"amx_bf16": "sapphirerapids", "avx512_bf16": "znver4", "avx512f": "skylake-avx512", "avx2": "haswell"}


class TimeIsUpError(Exception):
    """The search has had its time."""


@derived_object
class Clock(meta_schedule.measure_callback.PyMeasureCallback):
    """Notes what the search has found when, and ends it."""

    def __init__(self, budget_s: float) -> None:
        super().__init__()
        self.start, self.budget_s, self.best_s = time.perf_counter(), budget_s, float("inf")
        self.curve: list[tuple[float, float]] = []

    def apply(self, scheduler: Any, task: int, candidates: Any, built: Any, results: Any) -> None:
        """After every batch of measurements."""
        for result in results:
            if result.error_msg is None:
                self.best_s = min(self.best_s, float(np.median([float(seconds) for seconds in result.run_secs])))
        self.curve.append((time.perf_counter() - self.start, self.best_s))
        if self.is_over:
            raise TimeIsUpError

    @property
    def is_over(self) -> bool:
        """Whether the search has had its time."""
        return bool(self.curve) and self.curve[-1][0] > self.budget_s


def load(budget_s: float, threads: int, problem: Problem) -> Loaded:
    """Search, then make the best kernel ready; `how` lists [seconds since the start, best kernel's seconds] in JSON.

    Args:
        budget_s: Of the search.
        threads: Of the kernel and of the search.
        problem: A chain in fp32.
    """
    if problem.kind != "chain" or problem.dtype != "fp32" or problem.batch > 1:
        raise DeclinedError("chains in fp32 without a batch alone")
    module = tvm.IRModule({"main": _function(problem).with_attr("global_symbol", "main")})
    processor = next((name for flag, name in PROCESSORS.items() if flag in flags()), "x86-64")
    target = tvm.target.Target({"kind": "llvm", "mcpu": processor, "num-cores": threads})
    database, clock = meta_schedule.database.MemoryDatabase(), Clock(budget_s)
    callbacks = [meta_schedule.measure_callback.AddToDatabase(), meta_schedule.measure_callback.UpdateCostModel()]
    with TemporaryDirectory() as folder:
        try:
            meta_schedule.tune_tir(
                module, target, folder, max_trials_global=MAX_TRIALS, num_trials_per_iter=BATCH, database=database,
                num_tuning_cores=threads, seed=problem.seed, measure_callbacks=[*callbacks, clock],
            )  # fmt: skip
        except Exception:  # the callback's own comes back as one of TVM's
            if not clock.is_over:
                raise
    schedule = meta_schedule.tir_integration.compile_tir(database, module, target)
    function = tvm.compile(schedule.mod, target=target)["main"]
    inputs = problem.inputs()
    tensors = [tvm.runtime.tensor(inputs[name]) for name in "ABD"]
    E = tvm.runtime.tensor(np.zeros(problem.shapes()["E"], np.float32))

    def outputs() -> list[Array]:
        function(*tensors, E)
        return [E.numpy()]

    return Loaded(run=partial(function, *tensors, E), outputs=outputs, how=json.dumps(clock.curve))


def _function(problem: Problem) -> Any:
    A, B, D = (te.placeholder(problem.shapes()[name], "float32", name=name) for name in "ABD")
    k, n = te.reduce_axis((0, problem.K), "k"), te.reduce_axis((0, problem.N), "n")
    C = te.compute((problem.M, problem.N), lambda i, j: te.sum(A[i, k] * B[k, j], k), name="C")
    E = te.compute((problem.M, problem.H), lambda i, j: te.sum(C[i, n] * D[n, j], n), name="E")
    return te.create_prim_func([A, B, D, E])


if __name__ == "__main__":
    serve(partial(load, float(sys.argv[1]), int(sys.argv[2])), lambda: {"tvm": tvm.__version__})
