"""What the restore strategies save and cost: live bytes beside the ledger, resident memory, and time.

Live bytes are what the allocator reports on one rank during a forward and backward, beyond what was alive before, with
the block of shared buffers counted whole; the parameters' gradients are states, in the paper's terms, and left out.
"""

import functools
import itertools
import logging
import resource
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from configs.schema import Config
from moe_pipeline import MoELayer, PipelineConfig
from moe_pipeline.config import Restore
from moe_pipeline.plan.ledger import Ledger, ledger
from moe_pipeline.run.ranks import expert_ranks
from scripts.testbed import launch, plots
from scripts.testbed.benchmarks.own_layer import layer_shape, own_layer, step
from scripts.testbed.live_bytes import peak_bytes
from scripts.testbed.peers import MoESizes
from scripts.testbed.ranks import run_ranks
from scripts.testbed.report import Section, Table
from scripts.testbed.rows import Row, headlines
from scripts.testbed.timing import compare

logger = logging.getLogger(__name__)

NUM_RANKS = 2
HIDDEN_PER_WIDTH = 4  # H = 4M in all models of the paper
PAPER_WIDTHS = {"MoE-GPT3-S": 768, "MoE-BERT-L": 1024, "MoE-GPT3-XL": 2048}  # Table III
SEQUENTIAL = PipelineConfig(overlap=False)
TIMEOUT_S = 3000.0
MIB = 2**20


def bench(config: Config, run: launch.Run) -> launch.Outcome:
    """Measure live bytes of every case, resident memory of two, and the time of every strategy.

    Args:
        config: The run's configuration; `bench.width_divisor` scales the paper's models down.
        run: Where to write.
    """
    argument: dict[str, object] = {**asdict(config.bench), "seed": config.seed}
    logger.info("live bytes of %d cases and the ledger", len(_cases(argument)))
    cases = run_ranks(
        f"{__name__}:measure_live", argument, num_ranks=NUM_RANKS, folder=run.folder / "live", timeout_s=TIMEOUT_S
    )[0]["cases"]
    logger.info("resident memory")
    resident = {
        name: _resident_bytes(argument, run.folder / f"rss_{name}", **case)
        for name, case in (
            ("sequential", {"num_chunks": 1, "restore": "none", "overlap": False}),
            ("s4", {"num_chunks": max(config.bench.chunks), "restore": "S4", "overlap": True}),
        )
    }
    logger.info("time of every strategy")
    times = run_ranks(
        f"{__name__}:measure_time", argument, num_ranks=NUM_RANKS, folder=run.folder / "time", timeout_s=TIMEOUT_S
    )[0]["ratios"]
    summary = _summary(cases, resident, times)
    return launch.Outcome(
        rows=tuple(_rows(cases, resident, summary)),
        summary=summary,
        sections=tuple(_sections(config, cases, resident, times)),
    )


def widths(argument: dict[str, Any]) -> dict[str, int]:
    """The paper's models, scaled.

    Args:
        argument: The bench section.

    Returns:
        Model -> width M.
    """
    return {name: width // argument["width_divisor"] for name, width in PAPER_WIDTHS.items()}


def measure_live(rank: int, num_ranks: int, argument: dict[str, Any]) -> dict[str, Any]:
    """Live bytes of every case on one rank, and what the ledger says beforehand.

    Args:
        rank: This rank.
        num_ranks: Number of ranks.
        argument: The bench section and a seed.

    Returns:
        `cases`, one mapping each.
    """
    return {"cases": [_measure_case(rank, argument, *case) for case in _cases(argument)]}


def _cases(argument: dict[str, Any]) -> list[tuple[str, int, int, PipelineConfig]]:
    plans = [SEQUENTIAL] + [
        PipelineConfig(num_chunks=num_chunks, restore=restore)
        for num_chunks, restore in itertools.product(argument["chunks"], argument["restores"])
    ]
    return [
        (model, width, tokens, plan)
        for (model, width), tokens, plan in itertools.product(widths(argument).items(), argument["batch_tokens"], plans)
    ]


def _measure_case(
    rank: int, argument: dict[str, Any], model: str, width: int, tokens: int, plan: PipelineConfig
) -> dict[str, Any]:
    ranks = expert_ranks()
    sizes = _sizes(argument, width)
    layer = own_layer(sizes, seed=argument["seed"], pipeline=plan, ranks=ranks)
    x_TM, grad_TM = _data(rank, argument["seed"], tokens, width)
    step(layer, x_TM, grad_TM)  # the block of shared buffers has its size from here on
    layer.zero_grad(set_to_none=True)
    dist.barrier()
    pool_bytes = layer.workspace.free_bytes(x_TM.device)
    found_bytes = pool_bytes + peak_bytes(lambda: step(layer, x_TM, grad_TM))
    account = _ledger(sizes, tokens, plan)
    return {
        "model": model,
        "tokens": tokens,
        "num_chunks": plan.num_chunks,
        "restore": plan.restore,
        "overlap": plan.overlap,
        "live_bytes": found_bytes - account.gradient_bytes,
        "ledger_bytes": account.peak_bytes - account.gradient_bytes,
        "host_bytes": account.host_bytes,
        "ledger_error": abs(account.peak_bytes / found_bytes - 1),
    }


def _sizes(argument: dict[str, Any], width: int) -> MoESizes:
    return MoESizes(
        num_experts=argument["num_experts"],
        top_k=argument["top_k"],
        d_model=width,
        d_hidden=HIDDEN_PER_WIDTH * width,
        gated=False,
        activation="relu",
    )


def _ledger(sizes: MoESizes, tokens: int, plan: PipelineConfig) -> Ledger:
    return ledger(layer_shape(sizes, num_tokens=tokens, num_ranks=NUM_RANKS), plan)


def _data(rank: int, seed: int, tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed + rank)
    return torch.randn(tokens, width, generator=generator), torch.randn(tokens, width, generator=generator)


def _resident_bytes(argument: dict[str, object], folder: Path, **case: object) -> float:
    """Most resident memory of a fresh process that steps a few times at the largest batch, mean over ranks."""
    found = run_ranks(
        f"{__name__}:measure_resident", {**argument, **case}, num_ranks=NUM_RANKS, folder=folder, timeout_s=TIMEOUT_S
    )
    return statistics.mean(result["resident_bytes"] for result in found)


def measure_resident(rank: int, num_ranks: int, argument: dict[str, Any]) -> dict[str, Any]:
    """Steps at the largest batch of the largest model, for the process's most resident memory.

    Args:
        rank: This rank.
        num_ranks: Number of ranks.
        argument: The bench section, a seed, and one plan's fields.

    Returns:
        `resident_bytes`.
    """
    plan = PipelineConfig(num_chunks=argument["num_chunks"], restore=argument["restore"], overlap=argument["overlap"])
    width, tokens = max(widths(argument).values()), max(argument["batch_tokens"])
    layer = own_layer(_sizes(argument, width), seed=argument["seed"], pipeline=plan, ranks=expert_ranks())
    x_TM, grad_TM = _data(rank, argument["seed"], tokens, width)
    for _ in range(3):
        step(layer, x_TM, grad_TM)
    return {"resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def measure_time(rank: int, num_ranks: int, argument: dict[str, Any]) -> dict[str, Any]:
    """The time of every strategy against none, at the middle batch and chunk count, on loopback.

    Args:
        rank: This rank.
        num_ranks: Number of ranks.
        argument: The bench section and a seed.

    Returns:
        `ratios`: strategy -> time over that without reuse.
    """
    width = sorted(widths(argument).values())[1]
    tokens = sorted(argument["batch_tokens"])[len(argument["batch_tokens"]) // 2]
    num_chunks = sorted(argument["chunks"])[len(argument["chunks"]) // 2]
    ranks = expert_ranks()
    x_TM, grad_TM = _data(rank, argument["seed"], tokens, width)
    restores: list[Restore] = ["none", *(name for name in argument["restores"] if name != "none")]
    layers: dict[str, MoELayer] = {
        restore: own_layer(
            _sizes(argument, width),
            seed=argument["seed"],
            pipeline=PipelineConfig(num_chunks=num_chunks, restore=restore),
            ranks=ranks,
        )
        for restore in restores
    }

    def call(name: str) -> None:
        dist.barrier()
        step(layers[name], x_TM, grad_TM)

    peers: dict[str, Callable[[], object]] = {name: functools.partial(call, name) for name in layers}
    timings = compare(peers, repeats=argument["repeats"], warmup=argument["warmup"])
    return {"ratios": {name: timing.ratio for name, timing in timings.items()}}


def _summary(
    cases: list[dict[str, Any]], resident: dict[str, float], times: dict[str, float]
) -> dict[str, float | int | str | None]:
    ratios = [
        case["live_bytes"] / _sequential(cases, case)["live_bytes"]
        for case in cases
        if case["restore"] == "S4" and case["num_chunks"] == max(c["num_chunks"] for c in cases)
    ]
    return {
        "peak_vs_sequential": max(ratios, default=None),
        "ledger_error_max": max(case["ledger_error"] for case in cases),
        "rss_reduction_s4": 1 - resident["s4"] / resident["sequential"],
        **{f"strategy_overhead_{name.lower()}": ratio for name, ratio in times.items() if name != "none"},
    }


def _sequential(cases: list[dict[str, Any]], like: dict[str, Any]) -> dict[str, Any]:
    return next(
        case
        for case in cases
        if not case["overlap"] and (case["model"], case["tokens"]) == (like["model"], like["tokens"])
    )


def _name(case: dict[str, Any]) -> str:
    return "sequential" if not case["overlap"] else f"n{case['num_chunks']}_{case['restore']}"


def _rows(
    cases: list[dict[str, Any]], resident: dict[str, float], summary: dict[str, float | int | str | None]
) -> list[Row]:
    rows = []
    for case in cases:
        metric = f"{case['model']}_{case['tokens']}"
        provider = _name(case)
        rows.append(Row(provider=provider, metric=f"live_{metric}", unit="MiB", value=case["live_bytes"] / MIB))
        rows.append(Row(provider=provider, metric=f"host_{metric}", unit="MiB", value=case["host_bytes"] / MIB))
    for name, num_bytes in resident.items():
        rows.append(Row(provider=name, metric="peak_rss", unit="MiB", value=num_bytes / MIB))
    return [*rows, *headlines("moe_pipeline", summary)]


def _sections(
    config: Config, cases: list[dict[str, Any]], resident: dict[str, float], times: dict[str, float]
) -> list[Section]:
    bench = config.bench
    table = Table(
        headers=("Model", "Tokens", "Plan", "Live", "Ledger", "Host", "Against sequential"),
        rows=tuple(
            (
                case["model"],
                str(case["tokens"]),
                _name(case),
                f"{case['live_bytes'] / MIB:.1f} MiB",
                f"{case['ledger_bytes'] / MIB:.1f} MiB",
                f"{case['host_bytes'] / MIB:.1f} MiB",
                f"{case['live_bytes'] / _sequential(cases, case)['live_bytes']:.2f}",
            )
            for case in cases
        ),
    )
    largest = [
        case for case in cases if case["model"] == list(PAPER_WIDTHS)[-1] and case["tokens"] == max(bench.batch_tokens)
    ]
    curves: dict[str, list[float]] = {
        restore: [case["live_bytes"] / MIB for case in largest if case["restore"] == restore and case["overlap"]]
        for restore in bench.restores
    }
    note = (
        f"{NUM_RANKS} ranks, {bench.num_experts} experts, top {bench.top_k}, fp32; the paper's models with widths "
        f"divided by {bench.width_divisor}, H = 4M. Live bytes are measured, activations and buffers of one rank; "
        "sequential is n=1 without reuse (FastMoE's schedule). The host pool is ordinary memory on a CPU and counted "
        "apart."
    )
    chunks = ", ".join(f"{index}: n={count}" for index, count in enumerate(bench.chunks))
    return [
        Section(
            title="Live bytes",
            note=note,
            plots=(plots.bars(curves, title="Largest model and batch", x_label=chunks, y_label="MiB"),),
            table=table,
        ),
        Section(
            title="Resident memory and time",
            note="Most resident memory of a fresh process at the largest model and batch, mean over ranks; time of a "
            "step against no reuse, alternated, on loopback.",
            table=Table(
                headers=("", "Figure"),
                rows=(
                    *((f"peak RSS, {name}", f"{num_bytes / MIB:.0f} MiB") for name, num_bytes in resident.items()),
                    *((f"time, {name}", f"{ratio:.2f} x") for name, ratio in times.items()),
                ),
            ),
        ),
    ]
