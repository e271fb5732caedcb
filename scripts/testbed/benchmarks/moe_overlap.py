"""How much of the messages hides behind compute: our pipelined layer beside its baselines, on links shaped for real.

Every provider runs in the same process group and the same run, step by step in turn; a step's time is that of its
slowest rank. The number of chunks is chosen on the first rounds and reported on the others, so that choosing gains
nothing.
"""

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from configs.schema import Config
from moe_pipeline import PipelineConfig
from moe_pipeline.layer import recorded
from moe_pipeline.plan.timeline import Timeline
from moe_pipeline.run.ranks import expert_ranks
from scripts.testbed import launch, link, plots
from scripts.testbed.benchmarks.own_layer import alternate, own_layer, sizes_of, step
from scripts.testbed.files import write_text
from scripts.testbed.peers import MoESizes, deepspeed_layer
from scripts.testbed.ranks import run_ranks
from scripts.testbed.report import Section, Table, figure
from scripts.testbed.rows import Row, headlines

logger = logging.getLogger(__name__)

NUM_RANKS = 2
SEQUENTIAL = "n1"
SECONDS_PER_STEP = 30.0  # far above any step here; a link that hangs ends the run
LOOPBACK = link.label(0)


@dataclass(frozen=True)
class LinkResult:
    """What one link's ranks measured."""

    name: str
    times_us: Mapping[str, Sequence[float]]
    """Provider -> time of every round."""
    comm_us: float
    """Time of the messages of one step when nothing else runs: n=1, one operation after the other."""
    compute_us: float
    """Time of everything else in that step."""
    traces: Mapping[str, Mapping[str, Any]]
    """Provider -> one recorded step: spans for the picture, and its measures."""
    curve: tuple[link.LinkPoint, ...]


def bench(config: Config, run: launch.Run) -> launch.Outcome:
    """Measure on every link.

    Args:
        config: The run's configuration; `bench.links_mbit` names the links, 0 being loopback.
        run: Where to write.

    Returns:
        Rows, headline figures, timelines.

    Raises:
        ConfigError: Where this machine cannot shape links.
    """
    results = [_measure(config, run.folder, rate_mbit) for rate_mbit in config.bench.links_mbit]
    rows = tuple(row for result in results for row in _rows(result))
    summary: dict[str, float | int | str | None] = {}
    for result in results:
        summary |= _summary(result)
        write_text(run.folder / result.name / "timeline.svg", _picture(result))
    return launch.Outcome(rows=rows, summary=summary, sections=tuple(_section(config, result) for result in results))


def _measure(config: Config, folder: Path, rate_mbit: float) -> LinkResult:
    name, bench = link.label(rate_mbit), config.bench
    with link.joined(NUM_RANKS, rate_mbit, loopback="bench.links_mbit=[0]") as hosts:
        logger.info("link %s: all-to-all curve", name)
        points = link.curve(hosts, num_ranks=NUM_RANKS, folder=folder / name / "curve", repeats=bench.repeats)
        for point in points:
            logger.info(
                "  %5.0f KiB  %8.0f us  %.2f Gbit/s", point.size_bytes / 1024, point.median_us, point.gbit_per_s
            )
        logger.info("link %s: steps", name)
        argument = {**asdict(bench), "seed": config.seed, "sizes": asdict(sizes_of(bench))}
        num_steps = (bench.repeats + bench.warmup) * (len(bench.chunks) * 3 + 3)
        results = run_ranks(
            "scripts.testbed.benchmarks.moe_overlap:rank_main",
            argument,
            num_ranks=NUM_RANKS,
            folder=folder / name,
            hosts=hosts,
            timeout_s=120 + SECONDS_PER_STEP * num_steps,
        )
    first = results[0]
    for provider, trace in first["traces"].items():
        write_text(folder / name / f"{provider}.perfetto.json", trace.pop("perfetto"))
    return LinkResult(name, first["times_us"], first["comm_us"], first["compute_us"], first["traces"], points)


def rank_main(rank: int, num_ranks: int, argument: dict[str, Any]) -> dict[str, Any]:
    """One rank's part of a link's measurement.

    Args:
        rank: This rank.
        num_ranks: Number of ranks.
        argument: The bench section, the layer's sizes and a seed.

    Returns:
        The fields of `LinkResult`, but for the curve.
    """
    torch.manual_seed(argument["seed"] + rank)
    sizes = MoESizes(**argument["sizes"])
    layers = _layers(sizes, argument)
    x_TM = torch.randn(argument["num_tokens"], sizes.d_model)
    grad_TM = torch.randn_like(x_TM)
    steps = {name: (lambda layer=layer: step(layer, x_TM, grad_TM)) for name, layer in layers.items()}
    alone: list[Timeline] = []

    def sequential() -> None:
        with recorded(layers[SEQUENTIAL]) as recorder:
            step(layers[SEQUENTIAL], x_TM, grad_TM)
        alone.append(recorder.timeline())

    times_us = alternate({**steps, SEQUENTIAL: sequential}, repeats=argument["repeats"], warmup=argument["warmup"])
    traces = {name: _record(layers[name], steps[name]) for name in layers if name != "deepspeed"}
    del alone[: argument["warmup"]]
    return {
        "times_us": times_us,
        "comm_us": statistics.median(timeline.busy_us("comm") for timeline in alone),
        "compute_us": statistics.median(timeline.step_us - timeline.busy_us("comm") for timeline in alone),
        "traces": traces if rank == 0 else {},
    }


def _layers(sizes: MoESizes, argument: dict[str, Any]) -> dict[str, torch.nn.Module]:
    ranks = expert_ranks()
    plans = {SEQUENTIAL: PipelineConfig(overlap=False)}
    for chunks in argument["chunks"]:
        plans[f"pipelined_n{chunks}"] = PipelineConfig(num_chunks=chunks)
        if chunks > 1:
            plans[f"sequential_n{chunks}"] = PipelineConfig(num_chunks=chunks, overlap=False)
        if chunks > 2:
            plans[f"local_n{chunks}"] = PipelineConfig(num_chunks=chunks, split="local")
    plans["ranks_split"] = PipelineConfig(num_chunks=ranks.size, split="ranks")
    layers: dict[str, torch.nn.Module] = {
        name: own_layer(sizes, seed=argument["seed"], pipeline=plan, ranks=ranks, name=name)
        for name, plan in plans.items()
    }
    layers["deepspeed"] = deepspeed_layer(sizes, ep_size=ranks.size, seed=argument["seed"])
    return layers


def _record(layer: torch.nn.Module, run: Callable[[], None], repeats: int = 5) -> dict[str, Any]:
    """One recorded step, of a median length among a few."""
    timelines = []
    for _ in range(repeats):
        dist.barrier()
        with recorded(layer) as recorder:
            run()
        timelines.append(recorder.timeline())
    timeline = sorted(timelines, key=lambda timeline: timeline.step_us)[repeats // 2]
    spans = [
        {"stream": span.stream, "name": str(span.op), "start_us": span.start_us, "stop_us": span.stop_us}
        for span in timeline.spans
    ]
    return {
        "spans": spans,
        "perfetto": timeline.perfetto(),
        "step_us": timeline.step_us,
        "exposed_us": timeline.exposed_us,
    }


def best_chunks(times_us: Mapping[str, Sequence[float]], splits: tuple[str, ...] = ("pipelined", "local")) -> str:
    """The pipelined provider that was fastest in the first third of the rounds.

    Args:
        times_us: Provider -> time of every round.
        splits: Which of ours may be chosen: the paper's (pipelined), or also the one that computes local rows first.
    """
    pipelined = [name for name in times_us if name.split("_")[0] in splits]
    first = max(1, len(times_us[SEQUENTIAL]) // 3)
    return min(pipelined, key=lambda name: statistics.median(times_us[name][:first]))


def speedup(times_us: Mapping[str, Sequence[float]], over: str, provider: str) -> float:
    """How many times faster a provider is than another: the median over the rounds that chose nothing.

    Args:
        times_us: Provider -> time of every round.
        over: The slower one.
        provider: The faster one.
    """
    first = max(1, len(times_us[over]) // 3)
    pairs = list(zip(times_us[over], times_us[provider], strict=True))
    return statistics.median(slow / fast for slow, fast in pairs[first if len(pairs) > first else 0 :])


def _summary(result: LinkResult) -> dict[str, float | int | str | None]:
    times, link_name = result.times_us, result.name
    best = best_chunks(times)
    if link_name == LOOPBACK:
        two = {"loopback_cost_n2": speedup(times, "pipelined_n2", SEQUENTIAL)} if "pipelined_n2" in times else {}
        return {"loopback_ratio": speedup(times, SEQUENTIAL, best), "best_chunks_loopback": best, **two}
    papers = best_chunks(times, ("pipelined",))
    sequential = f"sequential_{best.split('_')[1]}".replace("sequential_n1", SEQUENTIAL)
    longer = max(result.comm_us, result.compute_us)
    return {
        f"speedup_vs_n1_{link_name}": speedup(times, SEQUENTIAL, best),
        f"speedup_vs_n1_papers_split_{link_name}": speedup(times, SEQUENTIAL, papers),
        f"speedup_bound_{link_name}": (result.comm_us + result.compute_us) / longer,
        f"speedup_vs_chunked_sequential_{link_name}": speedup(times, sequential, best),
        f"speedup_vs_ranks_split_{link_name}": speedup(times, "ranks_split", best),
        f"speedup_vs_deepspeed_{link_name}": speedup(times, "deepspeed", best),
        f"overlap_efficiency_{link_name}": longer / statistics.median(times[best]),
        f"best_chunks_{link_name}": best,
    }


def _rows(result: LinkResult) -> list[Row]:
    rows = []
    for provider, values in result.times_us.items():
        ordered = sorted(values)
        rows.append(
            Row(
                provider=provider,
                metric=f"step_time_{result.name}",
                unit="us",
                value=statistics.median(values),
                low=ordered[round(0.2 * (len(ordered) - 1))],
                high=ordered[round(0.8 * (len(ordered) - 1))],
            )
        )
    for name, value in (("comm_alone", result.comm_us), ("compute_alone", result.compute_us)):
        rows.append(Row(provider=SEQUENTIAL, metric=f"{name}_{result.name}", unit="us", value=value))
    return [*rows, *headlines("moe_pipeline", _summary(result))]


def _picture(result: LinkResult) -> str:
    best = best_chunks(result.times_us)
    lanes = {
        f"{provider} ({trace['step_us'] / 1e3:.0f} ms, {trace['exposed_us'] / 1e3:.0f} ms of messages exposed)": [
            (span["stream"], span["name"], span["start_us"], span["stop_us"]) for span in trace["spans"]
        ]
        for provider, trace in result.traces.items()
        if provider in (SEQUENTIAL, best, "ranks_split")
    }
    return plots.timelines(lanes, title=f"One step on {result.name}")


def _section(config: Config, result: LinkResult) -> Section:
    best, bench = best_chunks(result.times_us), config.bench
    curve = ", ".join(f"{point.size_bytes // 1024} KiB {point.gbit_per_s:.2f}" for point in result.curve)
    table_rows = tuple(
        (name, f"{statistics.median(values) / 1e3:.1f} ms", f"{speedup(result.times_us, name, best):.2f} x")
        for name, values in result.times_us.items()
    )
    return Section(
        title=f"Link {result.name}",
        note=f"{NUM_RANKS} ranks, one core each, {bench.num_tokens} tokens x {bench.d_model} a rank, hidden "
        f"{bench.d_hidden}, {bench.num_experts} experts, top {bench.top_k}, fp32, forward and backward; medians of "
        f"{bench.repeats} alternated rounds. n1: one chunk, one operation after the other (FastMoE's schedule). "
        "sequential: chunks without overlap. pipelined: the paper's split by tokens. local: ours, rows that stay on "
        "their rank first and last. ranks_split: FasterMoE's split, our implementation. Measured all-to-all, "
        f"Gbit/s per direction: {curve}. In n1 messages take {figure(result.comm_us / 1e3)} ms, the rest "
        f"{figure(result.compute_us / 1e3)} ms: hiding the shorter of them whole would give "
        f"{(result.comm_us + result.compute_us) / max(result.comm_us, result.compute_us):.2f} x.",
        plots=(_picture(result),),
        table=Table(headers=("Provider", "Step", f"{best} is faster by"), rows=table_rows),
    )
