"""What a search costs, cold and from the cache, what its winner lacks, and what TVM's search finds in as long."""

import json
import logging
import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from configs.schema import Config
from fusion.plan.interval import interval
from fusion.run.cache import Cache
from scripts.testbed import launch, plots
from scripts.testbed.benchmarks.cpu_candidates import drawn, measured_us, planner
from scripts.testbed.benchmarks.cpu_contests import OURS
from scripts.testbed.benchmarks.cpu_shapes import SEARCHED_CHAINS, searched
from scripts.testbed.benchmarks.cpu_truth import Truth
from scripts.testbed.instructions import instructions
from scripts.testbed.own_kernels import chain_of
from scripts.testbed.peer_processes.contest import contest
from scripts.testbed.peer_processes.problem import Problem
from scripts.testbed.peer_processes.process import PeerProcess
from scripts.testbed.peer_processes.roster import OWN, Peer, searching
from scripts.testbed.report import Section, Table
from scripts.testbed.rows import Row, headlines

logger = logging.getLogger(__name__)

THREADS = 1
FIRST = Problem(kind="chain", batch=1, M=16, N=16, K=16, H=16)
"""Planned before anything is timed: with it the device is measured and the modules are imported."""
TEN_TIMES = 10.0


@dataclass(frozen=True, kw_only=True)
class Rival:
    """What TVM's search found for a chain."""

    curve: tuple[tuple[float, float], ...]
    """Seconds since its start, and its best kernel's seconds by its own clock."""
    slowdown: float
    """Its last kernel's time over ours, both by our clock."""

    def kernel_slowdown(self, elapsed_s: float) -> float | None:
        """Its best kernel's time over ours after a while; None before it had any.

        Args:
            elapsed_s: Since its start.
        """
        found = [kernel_s for at_s, kernel_s in self.curve if at_s <= elapsed_s]
        return self.slowdown * found[-1] / self.curve[-1][1] if found else None

    @property
    def equal_s(self) -> float | None:
        """Seconds until its kernel was as fast as ours; None if it never was."""
        return next((at_s for at_s, _ in self.curve if (self.kernel_slowdown(at_s) or 2.0) <= 1.0), None)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operator."""

    shape: str
    cold_s: float
    warm_s: float
    regret: float
    """Time of the search's winner over the fastest of all that were measured, less 1."""
    rival: Rival | None

    @property
    def tuning_speedup(self) -> float | None:
        """TVM's time to a kernel as fast, or all it had, over ours."""
        if self.rival is None:
            return None
        return (self.rival.equal_s or self.rival.curve[-1][0]) / self.cold_s


def bench(config: Config, run: launch.Run) -> launch.Outcome:
    """Search for a kernel of every operator, twice, and see what else there is.

    Args:
        config: The run's configuration: `bench.cpu`.
        run: Where to write.

    Raises:
        ConfigError: Where a shape is unknown.
        PeerEnvironmentError: Where TVM cannot be installed.
    """
    problems = searched(config.bench.cpu)
    cold_s, warm_s = (_planned_s(problems, config.bench.cpu.compiled, run.folder) for _ in range(2))
    cases = []
    for name, problem in problems.items():
        wanted = name in SEARCHED_CHAINS[: config.bench.cpu.tvm_chains]
        rival = _rival(problem, cold_s[name], config, run.folder) if wanted else None
        regret = _regret(problem, config, run.folder)
        cases.append(Case(shape=name, cold_s=cold_s[name], warm_s=warm_s[name], regret=regret, rival=rival))
        logger.info("%-26s cold %.2f s, warm %.3f s, regret %.3f", name, cold_s[name], warm_s[name], regret)
    summary = _summary(cases)
    return launch.Outcome(
        rows=(*(row for case in cases for row in _rows(case)), *headlines("fusion", summary)),
        summary=summary,
        sections=(_section(cases),),
        versions=instructions(),
    )


@contextmanager
def _started(name: str, peer: Peer, folder: Path) -> Iterator[PeerProcess]:
    cores = sorted(os.sched_getaffinity(0))[-THREADS:]
    process = PeerProcess(name, peer, cores=cores, folder=folder / "peers")
    try:
        yield process
    finally:
        process.close()


def _planned_s(problems: dict[str, Problem], compiled: int | None, folder: Path) -> dict[str, float]:
    """Seconds to a kernel of each problem, in a new process that finds what an earlier one left in the run's folder."""
    own, cache = searching(OWN[OURS], compiled), str(folder.resolve() / "cache")
    peer = Peer(worker=own.worker, arguments=own.arguments, environment={"XDG_CACHE_HOME": cache})
    found = {}
    with _started(OURS, peer, folder) as process:
        process.load(FIRST)
        for name, problem in problems.items():
            process.load(problem)
            found[name] = float(process.planned_s or 0.0)
    return found


def _regret(problem: Problem, config: Config, folder: Path) -> float:
    """What the winner lacks against more of the model's favourites and kernels from all of the space."""
    chain = interval(chain_of(problem))
    plans = planner(THREADS, Cache(folder / "winners"), config.bench.cpu.compiled)
    winner = plans.winner(chain).schedule
    number = config.bench.cpu.candidates
    favourites = [schedule for schedule, _ in plans.candidates(chain, number)]
    others = drawn(chain, plans.device, number, seed=config.seed)
    times_us = measured_us(chain, list(dict.fromkeys([winner, *favourites, *others])), THREADS)
    return times_us[winner] / min(times_us.values()) - 1


def _rival(problem: Problem, cold_s: float, config: Config, folder: Path) -> Rival:
    budget_s = cold_s * config.bench.cpu.tvm_budget
    logger.info("TVM searches a kernel of %s for %.0f s", problem, budget_s)
    environment = {"TVM_NUM_THREADS": str(THREADS)}
    tvm = Peer(worker="tvm_search", arguments=(str(budget_s),), library="tvm", environment=environment)
    with _started("tvm", tvm, folder) as theirs, _started(OURS, OWN[OURS], folder) as ours:
        found = contest(
            problem, {OURS: ours, "tvm": theirs}, check=Truth(problem).check, rounds=config.bench.repeats, clock="cpu",
            at_least_s=config.bench.cpu.sample_ms / 1e3,
        )  # fmt: skip
        curve = tuple((at_s, kernel_s) for at_s, kernel_s in json.loads(theirs.how))
    return Rival(curve=curve, slowdown=found.times[OURS].speedup_over(found.times["tvm"]))


def _summary(cases: list[Case]) -> dict[str, float | int | str | None]:
    summary: dict[str, float | int | str | None] = {
        "seconds_cold_median": statistics.median(case.cold_s for case in cases),
        "seconds_cold_max": max(case.cold_s for case in cases),
        "seconds_warm": max(case.warm_s for case in cases),
        "regret_vs_exhaustive": max(case.regret for case in cases),
    }
    rivals = [(case.rival, case) for case in cases if case.rival is not None]
    if rivals:
        speedups = [case.tuning_speedup for _, case in rivals if case.tuning_speedup is not None]
        at_ten = [rival.kernel_slowdown(TEN_TIMES * case.cold_s) for rival, case in rivals]
        at_once = [rival.kernel_slowdown(case.cold_s) for rival, case in rivals]
        summary |= {
            "tuning_speedup_vs_tvm": min(speedups),
            "tvm_reached_equal_quality": sum(rival.equal_s is not None for rival, _ in rivals),
            "tvm_without_kernel_at_equal_budget": at_once.count(None),
            "tvm_without_kernel_at_ten_times": at_ten.count(None),
            "kernel_speedup_vs_tvm": min((each for each in at_ten if each is not None), default=None),
            "kernel_speedup_vs_tvm_at_last": min(rival.slowdown for rival, _ in rivals),
        }
    return summary


def _rows(case: Case) -> list[Row]:
    figures = {
        "seconds_cold": ("s", case.cold_s),
        "seconds_warm": ("s", case.warm_s),
        "regret": ("ratio", case.regret),
    }
    rows = [
        Row(provider="fusion", metric=f"{name}_{case.shape}", unit=unit, value=value)
        for name, (unit, value) in figures.items()
    ]
    if case.rival is not None and case.tuning_speedup is not None:
        rows += [
            Row(provider="tvm", metric=f"seconds_{case.shape}", unit="s", value=case.rival.curve[-1][0]),
            Row(provider="tvm", metric=f"tuning_time_ratio_{case.shape}", unit="x ours", value=case.tuning_speedup),
            Row(provider="tvm", metric=f"kernel_time_ratio_{case.shape}", unit="x ours", value=case.rival.slowdown),
        ]
    return rows


def _section(cases: list[Case]) -> Section:
    curves = {
        case.shape: (
            [at_s / case.cold_s for at_s, _ in case.rival.curve],
            [case.rival.kernel_slowdown(at_s) or 0.0 for at_s, _ in case.rival.curve],
        )
        for case in cases
        if case.rival is not None
    }
    table = []
    for case in cases:
        equal = ""
        if case.rival is not None:
            never = f"never in {case.rival.curve[-1][0]:.0f} s"
            equal = f"{case.rival.equal_s:.0f} s" if case.rival.equal_s is not None else never
        last = f"{case.rival.slowdown:.2f} x" if case.rival else ""
        own = (f"{case.cold_s:.2f} s", f"{1e3 * case.warm_s:.0f} ms", f"{case.regret:.1%}")
        table.append((case.shape, *own, equal, last))
    drawing = plots.curves(curves, title="TVM's best kernel", x_label="its time / ours", y_label="x our kernel's time")
    return Section(
        title="Cost of a search",
        note="fp32, one thread. Cold: to a compiled, checked and measured winner, on a machine whose device file is "
        "there. Warm: in another process. Regret: against as many favourites of the model and kernels drawn from the "
        "space as the configuration says. TVM: seconds until its kernel is as fast as ours, and its last kernel's "
        "time over ours.",
        plots=(drawing,) if curves else (),
        table=Table(headers=("Operator", "Cold", "Warm", "Regret", "TVM as fast", "TVM's kernel"), rows=tuple(table)),
    )
