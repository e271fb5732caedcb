"""The simulator against measurement: steps of many plans that calibration has not seen, on links shaped for real.

Each link is calibrated by micro-benchmarks; then real steps of every chunk count, strategy and batch run in turn, and
the simulator is asked for the same steps with the same rows per expert.
"""

import itertools
import logging
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from configs.schema import Config
from moe_pipeline import MoELayer, PipelineConfig
from moe_pipeline.config import Restore
from moe_pipeline.plan.call import plan_call
from moe_pipeline.plan.device import Device, device_json
from moe_pipeline.plan.partition import partition
from moe_pipeline.plan.simulator import step_us
from moe_pipeline.routing import expert_counts
from moe_pipeline.run.buffers import Workspace
from moe_pipeline.run.ranks import expert_ranks
from scripts.testbed import launch, link, plots
from scripts.testbed.benchmarks.own_layer import alternate, layer_shape, own_layer, sizes_of, step
from scripts.testbed.calibration import calibrate
from scripts.testbed.files import write_text
from scripts.testbed.peers import MoESizes
from scripts.testbed.ranks import run_ranks
from scripts.testbed.report import Section, Table
from scripts.testbed.rows import Row, headlines

logger = logging.getLogger(__name__)

NUM_RANKS = 2
CALIBRATION_REPEATS = 15
TIMEOUT_S = 3000.0
AS_GOOD = 0.03  # a choice agrees if its measured time is within this of the best measured


@dataclass(frozen=True, kw_only=True)
class Case:
    """One plan on one link, measured and simulated."""

    link: str
    tokens: int
    restore: Restore
    num_chunks: int
    measured_us: float
    predicted_us: float

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return abs(self.predicted_us / self.measured_us - 1)


def bench(config: Config, run: launch.Run) -> launch.Outcome:
    """Calibrate every link, measure and simulate every case.

    Args:
        config: The run's configuration.
        run: Where to write.

    Raises:
        ConfigError: Where this machine cannot shape links.
    """
    found = [case for rate_mbit in config.bench.links_mbit for case in _link(config, run.folder, rate_mbit)]
    return launch.Outcome(rows=tuple(_rows(found)), summary=_summary(found), sections=(_section(config, found),))


def _link(config: Config, folder: Path, rate_mbit: float) -> list[Case]:
    bench, name, sizes = config.bench, link.label(rate_mbit), sizes_of(config.bench)
    with link.joined(NUM_RANKS, rate_mbit, loopback="bench.links_mbit=[0]") as hosts:
        logger.info("link %s: micro-benchmarks", name)
        device = calibrate(
            sizes,
            hosts=hosts,
            num_ranks=NUM_RANKS,
            folder=folder / name / "calibration",
            repeats=CALIBRATION_REPEATS,
            name=name,
        )
        write_text(folder / name / "device.json", device_json(device))
        logger.info("link %s: steps", name)
        argument: dict[str, object] = {**asdict(bench), "seed": config.seed, "sizes": asdict(sizes)}
        measured = run_ranks(
            f"{__name__}:rank_main",
            argument,
            num_ranks=NUM_RANKS,
            folder=folder / name / "steps",
            hosts=hosts,
            timeout_s=TIMEOUT_S,
        )[0]
    cases = [
        Case(
            link=name,
            tokens=case["tokens"],
            restore=case["restore"],
            num_chunks=case["num_chunks"],
            measured_us=case["median_us"],
            predicted_us=_predict(sizes, case, measured["counts"][str(case["tokens"])], device),
        )
        for case in measured["cases"]
    ]
    logger.info("link %s: median error %.3f", name, statistics.median(case.error for case in cases))
    return cases


def rank_main(rank: int, num_ranks: int, argument: dict[str, Any]) -> dict[str, Any]:
    """Time every plan on one rank.

    Args:
        rank: This rank.
        num_ranks: Number of ranks.
        argument: The bench section, the layer's sizes and a seed.

    Returns:
        `cases` with the median time of the slowest rank, and `counts`: tokens -> rank -> rows per expert.
    """
    torch.manual_seed(argument["seed"] + rank)
    sizes, ranks, workspace = MoESizes(**argument["sizes"]), expert_ranks(), Workspace()
    cases, counts = [], {}
    for tokens in argument["batch_tokens"]:
        x_TM, grad_TM = torch.randn(tokens, sizes.d_model), torch.randn(tokens, sizes.d_model)
        layers: dict[str, MoELayer] = {}
        for restore, num_chunks in itertools.product(argument["restores"], argument["chunks"]):
            plan = PipelineConfig(num_chunks=num_chunks, restore=restore)
            layers[f"{restore} {num_chunks}"] = own_layer(
                sizes, seed=argument["seed"], pipeline=plan, ranks=ranks, workspace=workspace
            )
        first = next(iter(layers.values()))
        counts[str(tokens)] = _all_counts(expert_counts(first.gate(x_TM), num_experts=sizes.num_experts), num_ranks)
        steps = {name: (lambda layer=layer: step(layer, x_TM, grad_TM)) for name, layer in layers.items()}  # noqa: B023
        times_us = alternate(steps, repeats=argument["repeats"], warmup=argument["warmup"])
        for name, values in times_us.items():
            restore, num_chunks = name.split()
            cases.append(
                {
                    "tokens": tokens,
                    "restore": restore,
                    "num_chunks": int(num_chunks),
                    "median_us": statistics.median(values),
                }
            )
    return {"cases": cases, "counts": counts}


def _all_counts(own: Sequence[int], num_ranks: int) -> list[list[int]]:
    gathered = [torch.zeros(len(own), dtype=torch.int64) for _ in range(num_ranks)]
    dist.all_gather(gathered, torch.tensor(own))
    return [counts.tolist() for counts in gathered]


def _predict(sizes: MoESizes, case: dict[str, Any], counts: Sequence[Sequence[int]], device: Device) -> float:
    """The slowest rank's step by the simulator, with the very rows that were routed."""
    local = sizes.num_experts // NUM_RANKS
    shape = layer_shape(sizes, num_tokens=case["tokens"], num_ranks=NUM_RANKS)
    config = PipelineConfig(num_chunks=case["num_chunks"], restore=case["restore"])
    per_rank = [[tuple(rows[other * local : (other + 1) * local]) for other in range(NUM_RANKS)] for rows in counts]
    times_us = []
    for rank in range(NUM_RANKS):
        received = tuple(per_rank[other][rank] for other in range(NUM_RANKS))
        cut = partition(tuple(per_rank[rank]), received, num_chunks=config.fixed_chunks, rank=rank)
        times_us.append(step_us(plan_call("model", config, cut), shape, device, rank=rank))
    return max(times_us)


def agreements(cases: Sequence[Case]) -> list[bool]:
    """Whether the simulator's best plan is as good as the best measured, on every link for every batch and strategy.

    Args:
        cases: Of `bench`.
    """
    groups: dict[tuple[str, int, str], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.link, case.tokens, case.restore), []).append(case)
    return [
        min(group, key=lambda case: case.predicted_us).measured_us
        <= min(case.measured_us for case in group) * (1 + AS_GOOD)
        for group in groups.values()
    ]


def _summary(cases: Sequence[Case]) -> dict[str, float | int | str | None]:
    errors, agreed = sorted(case.error for case in cases), agreements(cases)
    return {
        "cases": len(cases),
        "median_error": statistics.median(errors),
        "p90_error": errors[round(0.9 * (len(errors) - 1))],
        "choice_agreement": sum(agreed) / len(agreed),
    }


def _rows(cases: Sequence[Case]) -> list[Row]:
    rows = []
    for case in cases:
        provider, metric = f"n{case.num_chunks}_{case.restore}", f"{case.link}_{case.tokens}"
        rows.append(Row(provider=provider, metric=f"measured_{metric}", unit="us", value=case.measured_us))
        rows.append(
            Row(provider=provider, metric=f"predicted_{metric}", unit="us", value=case.predicted_us, kind="simulated")
        )
    return [*rows, *headlines("simulator", _summary(cases))]


def _section(config: Config, cases: Sequence[Case]) -> Section:
    links = dict.fromkeys(case.link for case in cases)
    series = {
        link: (
            [case.measured_us / 1e3 for case in cases if case.link == link],
            [case.predicted_us / 1e3 for case in cases if case.link == link],
        )
        for link in links
    }
    table = Table(
        headers=("Link", "Tokens", "Strategy", "n", "Measured", "Simulated", "Error"),
        rows=tuple(
            (
                case.link,
                f"{case.tokens:,}",
                case.restore,
                str(case.num_chunks),
                f"{case.measured_us / 1e3:.1f} ms",
                f"{case.predicted_us / 1e3:.1f} ms",
                f"{100 * (case.predicted_us / case.measured_us - 1):+.1f} %",
            )
            for case in cases
        ),
    )
    bench = config.bench
    return Section(
        title="Simulated against measured",
        note=f"{NUM_RANKS} ranks, one core each, width {bench.d_model}, hidden {bench.d_hidden}, {bench.num_experts} "
        f"experts, top {bench.top_k}, fp32, forward and backward; medians of {bench.repeats} alternated rounds. The "
        "simulator knows micro-benchmarks of each link alone, never a step of these. A choice agrees where the chunk "
        f"count that the simulator prefers is measured within {AS_GOOD:.0%} of the best.",
        plots=(plots.points(series, title="Every case", x_label="measured (ms)", y_label="simulated (ms)"),),
        table=table,
    )
