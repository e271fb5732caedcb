"""Peers on one problem: each made ready and checked, then all timed in turns, so that a drift of the clock hits all."""

import logging
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from scripts.testbed.peer_processes.network import Network
from scripts.testbed.peer_processes.problem import Array, Problem
from scripts.testbed.peer_processes.process import PeerError, PeerProcess
from scripts.testbed.peer_processes.roster import OWN

logger = logging.getLogger(__name__)


class WrongError(RuntimeError):
    """A result is wrong; the message says whose, and how far off it is."""


@dataclass(frozen=True, kw_only=True)
class Time:
    """What one peer took."""

    seconds: tuple[float, ...]
    """Of a call, in every round."""
    flops: float
    """Of a call."""
    how: str
    """Which of its ways it took."""

    @property
    def median(self) -> float:
        """Seconds of a call."""
        return statistics.median(self.seconds)

    @property
    def gflops(self) -> float:
        """Rate at the median."""
        return self.flops / self.median / 1e9

    def speedup_over(self, other: "Time") -> float:
        """Median over the rounds of the other's time divided by this one's, in the same round."""
        return statistics.median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))

    def share_of(self, peak: "Time") -> float:
        """Median over the rounds of this one's rate divided by the other's, in the same round."""
        return self.speedup_over(peak) * self.flops / peak.flops


@dataclass(frozen=True, kw_only=True)
class Contest:
    """One problem, by all peers that can compute it."""

    problem: Problem | Network
    times: Mapping[str, Time]
    declined: Mapping[str, str]
    """Peer -> why it cannot, or what is wrong with what it computes."""


def contest(
    problem: Problem | Network,
    peers: Mapping[str, PeerProcess],
    *,
    check: Callable[[str, Array], None],
    rounds: int,
    clock: str,
    at_least_s: float,
) -> Contest:
    """Time peers in turns; every second round in reverse order.

    Args:
        problem: What to compute.
        peers: Name -> process; one at a time is asked to compute.
        check: Raises WrongError where what a peer computed is wrong; not asked of peers that compute nothing.
        rounds: Of which medians are taken, after one that does not count.
        clock: `cpu` or `wall`.
        at_least_s: Seconds over which short calls are repeated in a round.

    Raises:
        WrongError: If our own result is wrong; a peer whose result is wrong is left out.
        PeerError: If our own process fails; a peer that fails, say for want of memory, is left out.
    """
    ready: dict[str, PeerProcess] = {}
    declined: dict[str, str] = {}
    for name, process in peers.items():
        reason = _reason_against(name, process, problem, check)
        if reason is None:
            ready[name] = process
        else:
            declined[name] = reason
    samples: dict[str, list[tuple[float, float | None]]] = {name: [] for name in ready}
    for number in range(-1, rounds):
        for name in ready if number % 2 else reversed(ready):
            if name in declined:
                continue
            try:
                sample = ready[name].seconds(clock=clock, at_least=at_least_s)
            except PeerError as error:
                declined[name] = _failure(name, error)
                continue
            if number >= 0:
                samples[name].append(sample)
    times = {
        name: Time(
            seconds=tuple(seconds for seconds, _ in found), flops=found[0][1] or problem.flops, how=ready[name].how
        )
        for name, found in samples.items()
        if name not in declined
    }
    logger.info("%s: %s", problem, ", ".join(f"{name} {time.gflops:.0f}" for name, time in times.items()))
    return Contest(problem=problem, times=times, declined=declined)


def _reason_against(
    name: str, process: PeerProcess, problem: Problem | Network, check: Callable[[str, Array], None]
) -> str | None:
    """Why a peer does not compute a problem, or what is wrong with what it computes."""
    try:
        reason = process.load(problem)
        if reason is None and process.computes:
            check(name, process.computed())
    except PeerError as error:
        return _failure(name, error)
    except WrongError as error:
        if name in OWN:
            raise
        logger.warning("%s, by way of %s: left out", error, process.how or "the only one")
        return str(error)
    return reason


def _failure(name: str, error: PeerError) -> str:
    """Why a peer that failed is left out; our own may not fail."""
    if name in OWN:
        raise error
    logger.warning("%s: left out", error)
    return str(error).partition("\n")[0]
