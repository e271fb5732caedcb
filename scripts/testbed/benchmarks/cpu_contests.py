"""Our kernels beside all peers, problem by problem: started, checked, timed in turns, and told as rows and tables."""

import logging
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from configs.schema import Config
from configs.typed import ConfigError, closest
from scripts.testbed import plots
from scripts.testbed.benchmarks.cpu_truth import Truth
from scripts.testbed.instructions import instructions
from scripts.testbed.machine_load import MachineLoad
from scripts.testbed.peer_processes.contest import Contest, Time, contest
from scripts.testbed.peer_processes.network import Network
from scripts.testbed.peer_processes.problem import Problem
from scripts.testbed.peer_processes.process import PeerError, PeerProcess
from scripts.testbed.peer_processes.roster import NETWORK_PEERS, OWN, PEAKS, PEERS, Peer, searching
from scripts.testbed.report import Section, Table
from scripts.testbed.rows import Row

logger = logging.getLogger(__name__)

OURS, UNFUSED = "fusion", "fusion_unfused"
NOT_PEERS = {*OWN, *PEAKS}
CLOCKS = {1: "cpu"}
"""Threads -> what is read: one thread's CPU time says the same however busy the machine is, several need the wall's."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem with a number of threads."""

    shape: str
    threads: int
    contest: Contest

    @property
    def problem(self) -> Problem | Network:
        """What was computed."""
        return self.contest.problem

    @property
    def ours(self) -> Time:
        """Our kernel's."""
        return self.contest.times[OURS]

    @property
    def best_peer(self) -> str:
        """The fastest of all that are not ours."""
        peers = {name: time.median for name, time in self.contest.times.items() if name not in NOT_PEERS}
        return min(peers, key=lambda name: peers[name])

    def speedup_over(self, *names: str) -> float:
        """Our speed over that of the fastest of some peers.

        Args:
            names: Of peers, of which at least one computed the problem.
        """
        found = [self.contest.times[name] for name in names if name in self.contest.times]
        return min(self.ours.speedup_over(time) for time in found)

    def peak_fraction(self, *kinds: str) -> float | None:
        """Our rate over that of multiply-add instructions, the fastest of some kinds.

        Args:
            kinds: Of PEAKS; those that the processor lacks are passed over, and without any there is none.
        """
        found = [self.contest.times[kind] for kind in kinds if kind in self.contest.times]
        return min((self.ours.share_of(peak) for peak in found), default=None)

    @property
    def name(self) -> str:
        """Of its rows."""
        problem = self.problem
        marks = ["causal"] * getattr(problem, "causal", False) + ["train"] * problem.backward
        return "_".join([self.shape, *marks, problem.dtype, f"{self.threads}t"])


@dataclass(frozen=True, kw_only=True)
class Cases:
    """All that was timed, and on what."""

    cases: tuple[Case, ...]
    versions: dict[str, str]
    others_share: float | None
    """Part of the machine that other processes had meanwhile."""

    def of(self, threads: int | None = None, dtype: str = "fp32", **marks: bool) -> list[Case]:
        """Some of them.

        Args:
            threads: With so many; None takes all.
            dtype: In this precision.
            marks: Fields of a problem, such as causal.
        """
        return [
            case
            for case in self.cases
            if threads in (None, case.threads)
            and case.problem.dtype == dtype
            and all(getattr(case.problem, mark) == value for mark, value in marks.items())
        ]


def run_contests(
    problems: Sequence[tuple[str, Problem | Network]],
    config: Config,
    folder: Path,
    *,
    own: Mapping[str, Peer] = OWN,
    peers: Mapping[str, Peer] = PEERS,
) -> Cases:
    """Time problems by our kernels, the peers that the configuration names, and the processor's peak.

    Args:
        problems: Each with the name of its shape.
        config: The run's configuration: `bench.cpu`.
        folder: Where peers write.
        own: Our processes.
        peers: All there are.

    Raises:
        ConfigError: Where a peer is unknown, or the process may not use enough cores.
        PeerEnvironmentError: Where a peer cannot be installed.
        PeerError: Where one does not start.
        WrongError: Where one computes something else.
    """
    bench, allowed = config.bench, sorted(os.sched_getaffinity(0))
    ours = {name: searching(peer, bench.cpu.compiled) for name, peer in own.items()}
    roster = {**ours, **{name: peers[name] for name in _chosen(bench.cpu.peers, peers)}, **PEAKS}
    cases: list[Case] = []
    versions = instructions()
    shares: list[float | None] = []
    for threads in bench.thread_counts:
        if threads > len(allowed):
            raise ConfigError(f"bench.thread_counts: got {threads}, accepts up to the {len(allowed)} usable cores")
        with ExitStack() as stack:
            processes = {}
            for name, peer in roster.items():
                processes[name] = PeerProcess(name, peer, cores=allowed[-threads:], folder=folder / f"peers_{threads}t")
                stack.callback(processes[name].close)
                versions |= processes[name].facts
            load = MachineLoad([process.id for process in processes.values()])
            for shape, problem in problems:
                try:
                    found = contest(
                        problem,
                        processes,
                        check=Truth(problem).check,
                        rounds=bench.repeats,
                        clock=CLOCKS.get(threads, "wall"),
                        at_least_s=bench.cpu.sample_ms / 1e3,
                    )
                except PeerError as error:  # for want of memory, most likely: what was timed before is not lost
                    logger.error("%s with %d thread(s) is left out: %s", problem, threads, error)
                    continue
                cases.append(Case(shape=shape, threads=threads, contest=found))
            shares.append(load.share())
    known = [share for share in shares if share is not None]
    return Cases(cases=tuple(cases), versions=versions, others_share=max(known, default=None))


def _chosen(names: Sequence[str], peers: Mapping[str, Peer]) -> Sequence[str]:
    known = tuple({*PEERS, *NETWORK_PEERS})
    for name in names:
        if name not in known:
            raise ConfigError(f"bench.cpu.peers: got {name!r}, {closest(name, known)}")
    return [name for name in peers if name in (names or peers)]


def least(cases: Iterable[Case], figure: Callable[[Case], float | None]) -> float | None:
    """The smallest of a figure.

    Args:
        cases: Any.
        figure: Of a case, if it has one.
    """
    return min((value for case in cases if (value := figure(case)) is not None), default=None)


def geomean(cases: Iterable[Case], figure: Callable[[Case], float | None]) -> float | None:
    """The geometric mean of a figure.

    Args:
        cases: Any.
        figure: Of a case, if it has one.
    """
    values = [value for case in cases if (value := figure(case)) is not None]
    return statistics.geometric_mean(values) if values else None


def over(*names: str) -> Callable[[Case], float | None]:
    """Our speed over that of the fastest of some peers, for the cases that one of them computed.

    Args:
        names: Of peers; none takes all.
    """

    def figure(case: Case) -> float | None:
        chosen = [name for name in names or case.contest.times.keys() - NOT_PEERS if name in case.contest.times]
        return case.speedup_over(*chosen) if chosen else None

    return figure


def share_of(*kinds: str) -> Callable[[Case], float | None]:
    """Our rate over the fastest of some instructions.

    Args:
        kinds: Of PEAKS.
    """
    return lambda case: case.peak_fraction(*kinds)


def rows(found: Cases) -> list[Row]:
    """Rate of every peer in every case, with our speed over it.

    Args:
        found: What was timed.
    """
    listed = []
    for case in found.cases:
        for name, time in case.contest.times.items():
            ordered = sorted(time.flops / seconds / 1e9 for seconds in time.seconds)
            low, high = (ordered[round(part * (len(ordered) - 1))] for part in (0.2, 0.8))
            metric = f"rate_{case.name}"
            listed.append(Row(provider=name, metric=metric, unit="GFLOP/s", value=time.gflops, low=low, high=high))
            if name not in NOT_PEERS and OURS in case.contest.times:
                speedup = case.ours.speedup_over(time)
                listed.append(Row(provider=name, metric=f"speedup_over_{case.name}", unit="x", value=speedup))
    return listed


def sections(found: Cases, title: str, note: str) -> tuple[Section, ...]:
    """A table of rates for each kind of problem, precision and number of threads.

    Args:
        found: What was timed.
        title: Of the page's parts.
        note: What the reader should know.
    """
    groups: dict[str, list[Case]] = {}
    for case in found.cases:
        mode = "wall time" if case.threads > 1 else "CPU time"
        kinds = ["causal"] * getattr(case.problem, "causal", False) + ["with gradients"] * case.problem.backward
        groups.setdefault(", ".join([*kinds, case.problem.dtype, f"{case.threads} thread(s)", mode]), []).append(case)
    others = "" if found.others_share is None else f" Other processes had {found.others_share:.1%} of the machine."
    return tuple(_section(f"{title}: {name}", note + others, cases) for name, cases in groups.items())


def _section(title: str, note: str, cases: Sequence[Case]) -> Section:
    names = list(dict.fromkeys(name for case in cases for name in case.contest.times))
    declined = {name: reason for case in cases for name, reason in case.contest.declined.items() if name not in names}
    table = []
    for case in cases:
        rates = [case.contest.times.get(name) for name in names]
        cells = [f"{time.gflops:.0f}" if time else "-" for time in rates]
        against = f"{case.best_peer} {case.speedup_over(case.best_peer):.2f} x"
        table.append((case.name, *cells, against, case.ours.how))
    ways = {
        f"{name}: {time.how}"
        for case in cases
        for name, time in case.contest.times.items()
        if time.how and name not in NOT_PEERS
    }
    return Section(
        title=title,
        note=f"{note} GFLOP/s at the median of {len(cases[0].ours.seconds)} rounds in turns. Ways that libraries took: "
        f"{', '.join(sorted(ways)) or 'one each'}. Declined: "
        f"{'; '.join(f'{name}, {reason}' for name, reason in declined.items()) or 'none'}.",
        plots=(
            plots.bars(
                {
                    name: [time.gflops if (time := case.contest.times.get(name)) else 0.0 for case in cases]
                    for name in names
                },
                title="Rate", x_label="case, in the table's order", y_label="GFLOP/s",
            ),
        ),
        table=Table(headers=("Case", *names, "Over the best peer", "Our kernel"), rows=tuple(table)),
    )  # fmt: skip
