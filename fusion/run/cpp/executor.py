"""What runs a chain on a CPU: a C++ kernel, planned once for an interval of sizes, if it beats torch.

The model ranks schedules, the best few are compiled together, checked against the reference and measured beside torch.

Source: MCFuser (arXiv:2506.22169), Algorithm 1, with a CPU's model; what torch does is always a candidate here.
"""

import functools
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusion.emit.cpp.kernel import emit
from fusion.plan.chain import Chain
from fusion.plan.derived import GradientError
from fusion.plan.device import Device, load_device
from fusion.plan.footprint import pipeline, shared_bytes
from fusion.plan.gradient import gradients
from fusion.plan.interval import interval
from fusion.plan.orientation import OrientationError
from fusion.plan.partition import after_first, can_be_cut, first_alone
from fusion.plan.schedule import Schedule
from fusion.plan.search import search
from fusion.plan.space import SpaceError, search_space
from fusion.plan.stages import Elementwise
from fusion.run.autograd import Execution, ExecutorFor, apply
from fusion.run.cache import Cache
from fusion.run.cpp.build import BuildError, target
from fusion.run.cpp.calibrate import this_cpu
from fusion.run.cpp.native import NativeKernel, compile_together
from fusion.run.cpp.proof import ProofError, draw_tensors, prove
from fusion.run.unfused import run_unfused
from fusion.run.winner import Key, Winner

logger = logging.getLogger(__name__)

COMPILED = 6  # candidates of a search
NEARLY = 1.1  # times what is predicted: the model is not surer of a difference
ROUNDS = 5  # of measurements, at least; more of what is fast
ROUND_S = 0.02
TOLD_APART = 0.97  # of torch's time: the best of a few kernels was also the luckiest, and does not repeat it
CANNOT = (BuildError, GradientError, OrientationError, ProofError, SpaceError)


def cpp_executor(
    device: str | Path | None = None, cache_folder: str | Path | None = None, compiled: int | None = None
) -> ExecutorFor:
    """Run chains that are worth it as C++ kernels.

    Args:
        device: What to plan for, as `load_device` takes it; None is this machine's CPU, which is measured once.
        cache_folder: Where winners are kept; None is `default_folder()`.
        compiled: How many candidates of a search are compiled and measured; None is COMPILED.

    Returns:
        The function; it refuses chains that torch runs faster, that have no gradients, or that cannot be compiled.

    Raises:
        DeviceError: There is no such device.
    """
    named = None if device is None else load_device(device)
    planners: dict[int, CpuPlanner] = {}

    def executor_for(chain: Chain, needs: frozenset[str], where: torch.device) -> Execution | str:
        if where.type != "cpu":
            return f"a C++ kernel takes tensors on the CPU, not on {where}"
        num_threads = torch.get_num_threads()
        try:
            if num_threads not in planners:
                planners[num_threads] = CpuPlanner(named or this_cpu(), num_threads, Cache(cache_folder), compiled)
            return planners[num_threads].execution(chain, needs)
        except BuildError as error:
            _say_once(str(error))
            return str(error)

    return executor_for


@functools.cache
def _say_once(text: str) -> None:
    logger.warning("chains run unfused on the CPU: %s", text)


class CpuPlanner:
    """The chains of one CPU and number of threads, each planned once in this process.

    Source: not in the paper.
    """

    def __init__(self, device: Device, num_threads: int, cache: Cache, compiled: int | None = None) -> None:
        """Nothing planned yet.

        Args:
            device: Of a CPU.
            num_threads: That kernels run with.
            cache: Where winners are kept between processes.
            compiled: How many candidates of a search are compiled and measured; None is COMPILED.
        """
        self._compiled = compiled or COMPILED
        self.device, self.cache, self.num_threads = of_threads(device, num_threads), cache, num_threads
        self._ranked: dict[Chain, list[tuple[Schedule, float]]] = {}
        self._winners: dict[Chain, Winner] = {}
        self._kernels: dict[tuple[Chain, bool, bool], NativeKernel | None] = {}
        self._verdicts: dict[tuple[Chain, frozenset[str]], Execution | str] = {}

    def execution(self, chain: Chain, needs: frozenset[str]) -> Execution | str:
        """How a chain runs, or why it does not; the same for all sizes of its interval.

        Args:
            chain: What to run.
            needs: Names of the inputs that need a gradient.
        """
        key = interval(chain), needs
        if key not in self._verdicts:
            try:
                self._verdicts[key] = self._execution(*key)
            except CANNOT as error:
                self._verdicts[key] = str(error)
        return self._verdicts[key]

    def _execution(self, chain: Chain, needs: frozenset[str]) -> Execution | str:
        winner = self.winner(chain)
        for other in gradients(chain, needs).chains if needs else ():
            self.winner(interval(other))
        own_us, torch_us = _own_us(winner), winner.torch_us
        if needs or own_us is None or torch_us is None:
            own_us, torch_us = self.times_us(chain, needs)
        if own_us > TOLD_APART * torch_us:
            how = "as one kernel" if _is_whole(winner) else "in parts"
            return f"measured {own_us:.4g} us {how}, {torch_us:.4g} us in torch"
        return Execution(self, f"{self._how(chain)}; measured {own_us:.4g} us, {torch_us:.4g} us in torch")

    def _how(self, chain: Chain) -> str:
        """The schedule of a chain, or of its parts."""
        winner = self.winner(interval(chain))
        if _is_whole(winner):
            return str(winner.schedule)
        return f"{self._how(first_alone(chain))}, then {self._how(after_first(chain))}"

    def winner(self, chain: Chain) -> Winner:
        """The schedule of an interval: known, from the cache, or searched for.

        Args:
            chain: Whose sizes are upper ends of their intervals.

        Raises:
            SpaceError: No candidate fits the device.
            OrientationError: No kernel can be written for it.
            BuildError: It cannot be compiled.
            ProofError: The fastest kernel is wrong.
        """
        if chain not in self._winners:
            key = Key.of(chain, self.device.name)
            winner = self.cache.load(key)
            if winner is None:
                winner = self._search(chain)
                kernel = self._kernel(chain, winner.schedule)
                prove(kernel, chain, winner.schedule)
                if self._may_be_cut(chain, winner):
                    winner = replace(winner, parts_us=self._parts_us(chain, winner, kernel))
                self.cache.store(key, winner)
            self._winners[chain] = winner
        return self._winners[chain]

    def candidates(self, chain: Chain, number: int) -> list[tuple[Schedule, float]]:
        """The best schedules by the model, with the time that it predicts, in us.

        Args:
            chain: What to run.
            number: How many.

        Raises:
            SpaceError: No candidate fits the device.
        """
        if chain not in self._ranked:  # by a chain that it is part of, perhaps
            found = search(search_space(chain, self.device), pipeline=pipeline, shared_bytes=shared_bytes)
            trials = sorted((trial for round_ in found.rounds for trial in round_), key=lambda trial: trial.time_us)
            self._ranked[chain] = [(trial.schedule, trial.predicted.total_us) for trial in trials]
        return self._ranked[chain][:number]

    def _search(self, chain: Chain) -> Winner:
        ranked = self.candidates(chain, self._compiled)
        kernels = [emit(chain, plan, suffix=f"_{index}") for index, (plan, _) in enumerate(ranked)]
        compiled = compile_together(kernels, target())
        tensors = draw_tensors(chain)
        with torch.no_grad():
            runs: list[Callable[[], object]] = [functools.partial(kernel, chain, tensors) for kernel in compiled]
            if not _is_gradient(chain):
                runs.append(functools.partial(run_unfused, chain, tensors))
            times_us = measure_us(runs, self.num_threads)
        best = min(range(len(ranked)), key=times_us.__getitem__)
        torch_us = times_us[-1] if len(times_us) > len(ranked) else None
        return Winner(ranked[best][0], ranked[best][1], times_us[best], torch_us)

    def _may_be_cut(self, chain: Chain, winner: Winner) -> bool:
        """Whether the model does not tell a kernel from two."""
        if _is_gradient(chain) or not can_be_cut(chain):
            return False
        parts = [interval(first_alone(chain)), interval(after_first(chain))]
        try:
            predicted_us = sum(self.candidates(part, 1)[0][1] for part in parts)
        except CANNOT:
            return False
        return predicted_us < NEARLY * winner.predicted_us

    def _parts_us(self, chain: Chain, winner: Winner, kernel: NativeKernel) -> float | None:
        """What a chain takes as two kernels, on the clock that the winner was measured by; None if they cannot be."""
        tensors = draw_tensors(chain)
        runs = [functools.partial(kernel, chain, tensors), functools.partial(self._in_parts, chain, tensors)]
        try:
            with torch.no_grad():
                whole_us, parts_us = measure_us(runs, self.num_threads)
        except CANNOT as error:
            logger.info("%s is one kernel: %s", chain, error)
            return None
        return None if winner.measured_us is None else winner.measured_us * parts_us / whole_us

    def _in_parts(
        self, chain: Chain, tensors: Mapping[str, Tensor], *, exact: bool = False, save_lse: bool = False
    ) -> Any:
        first, rest = first_alone(chain), after_first(chain)
        value = self(first, {x.name: tensors[x.name] for x in first.inputs})
        known = {**tensors, first.output: value}
        return self(rest, {x.name: known[x.name] for x in rest.inputs}, exact=exact, save_lse=save_lse)

    def times_us(self, chain: Chain, needs: frozenset[str]) -> tuple[float, float]:
        """What a chain takes with kernels and in torch, measured side by side, with gradients where they are needed.

        Args:
            chain: That has been planned, as its gradients have.
            needs: Names of the inputs that need a gradient.
        """
        tensors = draw_tensors(chain)
        for name in needs:
            tensors[name].requires_grad_()
        wanted = [tensors[name] for name in sorted(needs)]

        def of(run: Callable[[Mapping[str, Tensor]], Tensor]) -> Callable[[], object]:
            if not wanted:
                return lambda: run(tensors)
            upstream = torch.ones_like(run(tensors))
            return lambda: torch.autograd.grad(run(tensors), wanted, upstream)

        unfused = functools.partial(run_unfused, chain)
        with torch.set_grad_enabled(bool(needs)):
            own, other = measure_us([of(lambda given: apply(chain, given, self)), of(unfused)], self.num_threads)
        return own, other

    def __call__(
        self, chain: Chain, tensors: Mapping[str, Tensor], *, exact: bool = False, save_lse: bool = False
    ) -> Any:
        key = interval(chain), exact, save_lse
        if key not in self._kernels:
            winner = self.winner(key[0])
            whole = _is_whole(winner)
            self._kernels[key] = (
                self._kernel(key[0], winner.schedule, exact=exact, save_lse=save_lse) if whole else None
            )
        kernel = self._kernels[key]
        if kernel is None:
            return self._in_parts(chain, tensors, exact=exact, save_lse=save_lse)
        written = kernel(chain, tensors)
        return (written[0], written[1]) if save_lse else written[0]

    def _kernel(self, chain: Chain, plan: Schedule, *, exact: bool = False, save_lse: bool = False) -> NativeKernel:
        kernel = emit(chain, plan, exact=exact, save_lse=save_lse)
        return compile_together([kernel], target())[0]


def _is_whole(winner: Winner) -> bool:
    """Whether a chain runs as one kernel: two have to be faster beyond doubt."""
    return winner.parts_us is None or winner.measured_us is None or winner.parts_us > TOLD_APART * winner.measured_us


def _own_us(winner: Winner) -> float | None:
    return winner.measured_us if _is_whole(winner) else winner.parts_us


def _is_gradient(chain: Chain) -> bool:
    """Whether a chain is part of a backward pass, which torch does in its own way, not as this chain."""
    operations = [stage.operation for stage in chain.stages if isinstance(stage, Elementwise)]
    return any(operation == "exp_minus" or operation.endswith("_grad") for operation in operations)


def of_threads(device: Device, num_threads: int) -> Device:
    """The part of a CPU that a number of threads uses.

    Args:
        device: All of its cores.
        num_threads: At least 1; more than there are cores share them.

    Source: not in the paper.
    """
    cores = min(num_threads, device.num_sms)
    share = cores / device.num_sms
    return replace(
        device,
        name=f"{device.name}_{device.arch}_{num_threads}",
        num_sms=cores,
        fp32_flops_per_s=device.fp32_flops_per_s * share,
        fp16_flops_per_s=device.fp16_flops_per_s * share,
        bf16_flops_per_s=device.bf16_flops_per_s * share,
    )


def measure_us(runs: Sequence[Callable[[], object]], num_threads: int) -> list[float]:
    """What each of several functions takes: medians, in turns, of the thread's own time where there is one.

    Args:
        runs: To be measured.
        num_threads: That they run with.

    Source: not in the paper.
    """
    clock = time.thread_time if num_threads == 1 else time.perf_counter
    times: list[list[float]] = [[] for _ in runs]
    repeats = []
    for run in runs:
        run()
        start = clock()
        run()
        repeats.append(max(1, int(ROUND_S / max(clock() - start, 1e-7))))
    for _ in range(ROUNDS):
        for run, number, own in zip(runs, repeats, times, strict=True):
            start = clock()
            for _ in range(number):
                run()
            own.append(1e6 * (clock() - start) / number)
    return [statistics.median(own) for own in times]
