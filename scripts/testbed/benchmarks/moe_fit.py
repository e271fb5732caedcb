"""Fit what the papers do not give of their cluster, on figure 12 alone; every other figure is then a prediction.

What is published stands: rates of links, of memory and of a copy. What is fitted decides how splitting pays.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from configs.schema import Config
from moe_pipeline.plan.device import Device, Speed, device_json, interference
from scripts.testbed import launch
from scripts.testbed.benchmarks import moe_paper
from scripts.testbed.benchmarks.moe_paper_layer import paper_shape, pipelined, time_us
from scripts.testbed.files import write_text
from scripts.testbed.report import Section, Table
from scripts.testbed.rows import Row

logger = logging.getLogger(__name__)

TENSOR_CORE_FLOPS = 312e12
NVLINK_BYTES = 300e9
NODE_LINK_BYTES = 25e9
COPY_BYTES = 24e9
MEMORY_BYTES = 1555e9
LATENCY_US = 10.0
ORIGIN = (
    "Published: 8 DGX A100 with 40 GB a GPU, one 200 Gb/s HDR port a GPU, NVLink3 at 300 GB/s a direction, memory at "
    "1,555 GB/s, interference (MPipeMoE figure 3). Fitted on MPipeMoE figure 12 alone: rate and latency of products, "
    "the volume below which all-to-alls between nodes lose half their rate, what a step does outside its schedules. "
    "Assumed: 24 GB/s for pinned copies over PCIe 4.0 x16 (31.5 GB/s), 10 us for messages and copies."
)
ROUNDS, ITERATIONS = 3, 90
SPREAD = 0.7  # of the first simplex, in logarithms
RMS_WEIGHT, ORDER_WEIGHT = 0.2, 3.0
ORDER_MARGIN = 0.001
DIGITS = 4

Speeds = dict[int, float]
"""Chunks -> speed over one chunk."""


@dataclass(frozen=True, kw_only=True)
class Unknowns:
    """What is fitted."""

    product_flops: float
    """Rate of large matrix products, in FLOP/s."""
    product_latency_us: float
    """What each product costs beside it: products of rate times latency run at half the rate."""
    slow_below_bytes: float
    """All-to-alls of this volume reach the link's rate; those of half of it and less reach half of it."""
    outside_us: float
    """What a step does outside its schedules."""


START = Unknowns(product_flops=TENSOR_CORE_FLOPS / 2, product_latency_us=50.0, slow_below_bytes=10e6, outside_us=3000.0)


def cluster(unknowns: Unknowns) -> Device:
    """The papers' first cluster.

    Args:
        unknowns: What they do not give.
    """
    slow_bytes = unknowns.slow_below_bytes
    return Device(
        name="a100_hdr",
        origin=ORIGIN,
        product=Speed(unknowns.product_latency_us, ((1.0, unknowns.product_flops),)),
        message=Speed(LATENCY_US, ((1.0, NVLINK_BYTES),)),
        node_message=Speed(LATENCY_US, ((slow_bytes / 2, NODE_LINK_BYTES / 2), (slow_bytes, NODE_LINK_BYTES))),
        ranks_per_node=8,
        peer_us=0.0,
        copy=Speed(LATENCY_US, ((1.0, COPY_BYTES),)),
        rows=Speed(0.0, ((1.0, MEMORY_BYTES),)),
        outside=Speed(unknowns.outside_us, ((1.0, 1e15),)),
        interference=interference(
            {
                "comm": {"compute": 0.72, "copy": 0.78, "all": 0.71},
                "compute": {"comm": 0.96, "copy": 1.0, "all": 0.94},
                "copy": {"comm": 0.80, "compute": 0.98, "all": 0.71},
            }
        ),
        one_thread=False,
        issue_us=0.0,
        send_us=0.0,
        burst_us=0.0,
        messages_at_once=1,
        together_gain=1.0,
        memory_bytes=40 * 10**9,
        host_bytes=1900 * 2**30 // 8,
        pinned=True,
    )


def tune(config: Config, run: launch.Run) -> launch.Outcome:
    """Search the unknowns and write the device file into the run's folder.

    Args:
        config: The run's configuration; a shrunk run searches little.
        run: Where to write.
    """
    rounds, iterations = (1, 2) if config.smoke else (ROUNDS, ITERATIONS)
    found = fit(rounds=rounds, iterations=iterations)
    device, path = cluster(found), run.folder / "a100_hdr.json"
    write_text(path, device_json(device))
    speeds = figure_12(device)
    errors = speed_errors(speeds)
    summary: dict[str, float | int | str | None] = {
        **asdict(found),
        "max_error": max(map(abs, errors.values())),
        "optimum_matches": sum(violation == 0 for violation in order_violations(speeds).values()),
        "device_file": str(path),
    }
    rows = [
        Row(provider="fit", metric=f"speed_{num_tokens}_n{num_chunks}_error", unit="ratio", value=error)
        for (num_tokens, num_chunks), error in errors.items()
    ]
    rows += [Row(provider="fit", metric=name, unit=_unit(name), value=value) for name, value in asdict(found).items()]
    return launch.Outcome(kind="simulated", rows=tuple(rows), summary=summary, sections=(_section(found, errors),))


def fit(*, rounds: int = ROUNDS, iterations: int = ITERATIONS) -> Unknowns:
    """The unknowns that come closest to figure 12; the same ones in every run.

    Args:
        rounds: Searches, each from where the last one ended.
        iterations: Steps of each.
    """
    best = [math.log(value) for value in asdict(START).values()]
    for index in range(rounds):
        best = nelder_mead(lambda logs: loss(cluster(_unknowns(logs))), best, SPREAD / 2**index, iterations)
        logger.info("round %d: loss %.4f at %s", index + 1, loss(cluster(_unknowns(best))), _unknowns(best))
    return Unknowns(**{name: float(f"{value:.{DIGITS}g}") for name, value in asdict(_unknowns(best)).items()})


def _unknowns(logs: Sequence[float]) -> Unknowns:
    return Unknowns(**dict(zip(asdict(START), map(math.exp, logs), strict=True)))


def loss(device: Device) -> float:
    """Largest error, some of the others, and where another number of chunks is fastest than in the paper.

    Args:
        device: Where.
    """
    speeds = figure_12(device)
    errors = speed_errors(speeds).values()
    rms = math.sqrt(sum(error * error for error in errors) / len(errors))
    return max(map(abs, errors)) + RMS_WEIGHT * rms + ORDER_WEIGHT * sum(order_violations(speeds).values())


def with_products(device: Device, flops: float) -> Device:
    """The same device with another rate of products.

    Args:
        device: Any.
        flops: In FLOP/s.
    """
    return replace(device, product=Speed(device.product.latency_us, ((1.0, flops),)))


def simulated_speeds(num_tokens: int, device: Device) -> Speeds:
    """Speed of figure 12's chunk counts over one chunk, one chunk included.

    Args:
        num_tokens: B.
        device: Where.
    """
    shape = paper_shape("MoE-GPT3-XL", num_tokens)
    times_us = {num_chunks: time_us(shape, pipelined(num_chunks), device) for num_chunks in (1, 2, 4, 8)}
    return {num_chunks: times_us[1] / time for num_chunks, time in times_us.items()}


def figure_12(device: Device) -> dict[int, Speeds]:
    """The speeds of all batches of figure 12.

    Args:
        device: Where.
    """
    return {num_tokens: simulated_speeds(num_tokens, device) for num_tokens in moe_paper.SPEED_OVER_ONE_CHUNK}


def speed_errors(found: dict[int, Speeds]) -> dict[tuple[int, int], float]:
    """Simulated minus printed speeds of figure 12.

    Args:
        found: Of `figure_12`.

    Returns:
        (tokens, chunks) -> difference.
    """
    return {
        (num_tokens, num_chunks): found[num_tokens][num_chunks] - speed
        for num_tokens, speeds in moe_paper.SPEED_OVER_ONE_CHUNK.items()
        for num_chunks, speed in speeds.items()
    }


def order_violations(found: dict[int, Speeds]) -> dict[int, float]:
    """By how much a number of chunks that is not the paper's is faster.

    Args:
        found: Of `figure_12`.

    Returns:
        Tokens -> difference of speeds; 0 where the fastest number is the paper's.
    """
    violations = {}
    for num_tokens, printed in moe_paper.SPEED_OVER_ONE_CHUNK.items():
        speeds = found[num_tokens]
        fastest = {n for n, speed in printed.items() if speed > max(printed.values()) - moe_paper.SAME_BARS}
        ahead = max(speeds.values()) - max(speeds[num_chunks] for num_chunks in fastest)
        violations[num_tokens] = ahead + ORDER_MARGIN if ahead > 0 else 0.0
    return violations


def nelder_mead(
    function: Callable[[Sequence[float]], float], start: Sequence[float], spread: float, iterations: int
) -> list[float]:
    """Minimise a function of a few numbers with a simplex.

    Args:
        function: What to minimise.
        start: Where to begin.
        spread: Distance of the other corners of the first simplex.
        iterations: Steps.

    Returns:
        The best point.
    """
    count = len(start)
    corners = [list(start)] + [[x + spread * (i == j) for j, x in enumerate(start)] for i in range(count)]
    points = sorted((function(corner), corner) for corner in corners)
    for _ in range(iterations):
        *kept, (worst, corner) = points
        center = [sum(point[j] for _, point in kept) / count for j in range(count)]

        def moved(by: float, center: list[float] = center, corner: list[float] = corner) -> tuple[float, list[float]]:
            point = [c + by * (x - c) for c, x in zip(center, corner, strict=True)]
            return function(point), point

        new = moved(-1.0)
        if new < points[0]:
            new = min(new, moved(-2.0))
        elif new >= kept[-1]:
            new = moved(0.5)
        if new[0] < worst:
            points = sorted([*kept, new])
        else:
            best = points[0][1]
            shrunk = [[(x + b) / 2 for x, b in zip(point, best, strict=True)] for _, point in points[1:]]
            points = sorted([points[0], *((function(point), point) for point in shrunk)])
    return points[0][1]


def _unit(name: str) -> str:
    return {"flops": "FLOP/s", "us": "us", "bytes": "bytes"}[name.rsplit("_", 1)[1]]


def _section(found: Unknowns, errors: dict[tuple[int, int], float]) -> Section:
    return Section(
        title="Fit on figure 12",
        note=f"{len(asdict(found))} unknowns, {len(errors)} printed speeds; the rest of the device is published or "
        f"assumed. {ORIGIN}",
        table=Table(
            headers=("", "Figure"),
            rows=(
                *((name, f"{value:.4g} {_unit(name)}") for name, value in asdict(found).items()),
                *((f"B={b}, n={n}: ours minus paper", f"{error:+.3f}") for (b, n), error in errors.items()),
            ),
        ),
    )
