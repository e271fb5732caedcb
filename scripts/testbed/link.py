"""How long an all-to-all takes on a link, by size: measured, as collectives do not get a link's nominal rate."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from configs.typed import ConfigError
from scripts.testbed.network import Host, NetworkError, shaped_hosts
from scripts.testbed.ranks import run_ranks
from scripts.testbed.report import Table, figure

KIB = 1024
SIZES_BYTES = tuple(KIB * 2**power for power in range(4, 14))
"""16 KiB to 8 MiB."""
WARMUP = 2


@dataclass(frozen=True, kw_only=True)
class LinkPoint:
    """Time of one all-to-all: of its slowest rank, over the repeats."""

    size_bytes: int
    """Bytes each rank sends to each other rank."""
    median_us: float
    low_us: float
    """20th percentile."""
    high_us: float
    """80th percentile."""
    gbit_per_s: float
    """What a rank sends to all others, by the median: the rate of its link in one direction."""


def label(rate_mbit: float) -> str:
    """A link's name, for metrics and folders.

    Args:
        rate_mbit: Its rate in Mbit/s; 0 is loopback.
    """
    return f"{rate_mbit / 1000:g}gbit" if rate_mbit else "loopback"


@contextmanager
def joined(num_ranks: int, rate_mbit: float, *, loopback: str) -> Iterator[tuple[Host, ...]]:
    """A host for each rank, joined by a link of a rate, for as long as the context lasts.

    Args:
        num_ranks: Number of ranks.
        rate_mbit: Rate in Mbit/s; 0 is loopback, which needs no hosts.
        loopback: The setting that takes loopback alone, as on the command line.

    Yields:
        The hosts; none for loopback.

    Raises:
        ConfigError: Where this machine cannot shape links.
    """
    if not rate_mbit:
        yield ()
        return
    try:
        with shaped_hosts(num_ranks, rate_mbit=rate_mbit) as hosts:
            yield hosts
    except NetworkError as error:
        raise ConfigError(f"{loopback.split('=')[0]}: {error}; or take loopback alone: {loopback}") from error


def curve(
    hosts: Sequence[Host],
    *,
    num_ranks: int,
    folder: Path,
    sizes_bytes: Sequence[int] = SIZES_BYTES,
    repeats: int = 15,
    timeout_s: float = 600.0,
) -> tuple[LinkPoint, ...]:
    """Measure the all-to-all of a link.

    Args:
        hosts: One for each rank; where empty, loopback is measured.
        num_ranks: Ranks that take part, at least 2.
        folder: Where the ranks write.
        sizes_bytes: Bytes each rank sends to each other rank, one point each.
        repeats: Timed all-to-alls of a point.
        timeout_s: Time for the whole curve, in seconds.

    Returns:
        One point for each size, in their order.

    Raises:
        ValueError: Where an argument is out of its range.
        RankError: Where a rank fails or time is up.
    """
    if num_ranks < 2:
        raise ValueError(f"num_ranks: got {num_ranks}, accepts 2 or more: one rank has nobody to send to")
    if repeats < 1:
        raise ValueError(f"repeats: got {repeats}, accepts 1 or more")
    if not sizes_bytes or min(sizes_bytes) < 1:
        raise ValueError(f"sizes_bytes: got {tuple(sizes_bytes)}, accepts one or more positive numbers of bytes")
    results = run_ranks(
        "scripts.testbed.link:all_to_all_curve",
        {"sizes_bytes": list(sizes_bytes), "repeats": repeats},
        num_ranks=num_ranks,
        folder=folder,
        hosts=hosts,
        timeout_s=timeout_s,
    )
    return tuple(LinkPoint(**point) for point in results[0]["points"])


def all_to_all_curve(rank: int, num_ranks: int, argument: dict[str, Any]) -> dict[str, Any]:
    """The curve as one rank of a process group measures it; all ranks return the same.

    Args:
        rank: This rank.
        num_ranks: Ranks of the process group.
        argument: `sizes_bytes`, a list, and `repeats`.

    Returns:
        `points`: the fields of a LinkPoint for each size.
    """
    return {"points": [_point(num_ranks, size, argument["repeats"]) for size in argument["sizes_bytes"]]}


def table(points: Sequence[LinkPoint]) -> Table:
    """The curve for a report.

    Args:
        points: What `curve` returned.
    """
    headers = ("KiB to each other rank", "median us", "20th percentile", "80th percentile", "Gbit/s per direction")
    rows = tuple(
        tuple(
            figure(value)
            for value in (point.size_bytes / KIB, point.median_us, point.low_us, point.high_us, point.gbit_per_s)
        )
        for point in points
    )
    return Table(headers=headers, rows=rows)


def _point(num_ranks: int, size_bytes: int, repeats: int) -> dict[str, float]:
    sent = torch.ones(num_ranks * size_bytes, dtype=torch.uint8)
    received = torch.empty_like(sent)
    times_us = torch.zeros(WARMUP + repeats, dtype=torch.float64)
    for repeat in range(WARMUP + repeats):
        dist.barrier()
        start_ns = time.perf_counter_ns()
        dist.all_to_all_single(received, sent)
        times_us[repeat] = (time.perf_counter_ns() - start_ns) / 1e3
    dist.all_reduce(times_us, dist.ReduceOp.MAX)
    shares = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    low_us, median_us, high_us = times_us[WARMUP:].quantile(shares).tolist()
    bits = 8 * size_bytes * (num_ranks - 1)
    return {
        "size_bytes": size_bytes,
        "median_us": median_us,
        "low_us": low_us,
        "high_us": high_us,
        "gbit_per_s": bits / (median_us * 1e3),
    }
