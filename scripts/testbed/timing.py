"""Peers timed fairly: warmed up, alternated round by round, in one process, with medians and percentiles."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Times of one peer over the rounds of a comparison."""

    median_us: float
    low_us: float
    """20th percentile."""
    high_us: float
    """80th percentile."""
    ratio: float
    """Median over rounds of this peer's time divided by the first peer's in the same round."""


def compare(
    peers: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int,
    clock_ns: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, Timing]:
    """Time peers against each other.

    Args:
        peers: Name -> what to call; the first is what the others are compared with.
        repeats: Timed rounds; in each, every peer runs once, and every second round in reverse order.
        warmup: Rounds before them.
        clock_ns: What is read; with one thread the process's CPU time says the same however busy the machine is.

    Returns:
        Name -> timing.
    """
    names = list(peers)
    times_us: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(-warmup, repeats):
        for name in names if round_number % 2 else reversed(names):
            start_ns = clock_ns()
            peers[name]()
            _synchronize()
            if round_number >= 0:
                times_us[name].append((clock_ns() - start_ns) / 1e3)
    first = times_us[names[0]]
    return {name: _timing(times, first) for name, times in times_us.items()}


def _timing(times_us: list[float], first_us: list[float]) -> Timing:
    ratios = [own / other for own, other in zip(times_us, first_us, strict=True)]
    return Timing(
        median_us=statistics.median(times_us),
        low_us=_percentile(times_us, 0.2),
        high_us=_percentile(times_us, 0.8),
        ratio=statistics.median(ratios),
    )


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[round(share * (len(values) - 1))]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
