"""The funnel: every candidate of a chain, what each rule drops, and what three ways to search find in the rest."""

import logging
import math

from configs.schema import Config
from fusion import gemm_chain
from fusion.plan.footprint import pipeline, shared_bytes
from fusion.plan.search import Result, exhaustive_search, random_search
from fusion.plan.space import Space, search_space
from scripts.testbed import launch, plots
from scripts.testbed.benchmarks.fusion_plans import devices, planned
from scripts.testbed.report import Section, Table
from scripts.testbed.rows import Row

logger = logging.getLogger(__name__)

PAPER = {"expressions": 26, "after_rule1": 5, "after_rule2": 3}  # of candidates it gives powers of ten alone


def tune(config: Config, run: launch.Run) -> launch.Outcome:
    """Count the space of one chain after each rule, and search what is left.

    Args:
        config: The run's configuration: `tune.kernels` with a chain's sizes and one device or more.
        run: Where to write.

    Raises:
        ConfigError: Where a device cannot be used.
    """
    section = config.tune.kernels
    chain = gemm_chain(**{letter: getattr(section.chain, letter) for letter in "MNKH"}, dtype="fp16")
    rows: list[Row] = []
    sections = []
    summary: dict[str, float | int | str | None] = {}
    for device in devices(section.devices, argument="tune.kernels.devices"):
        space = search_space(chain, device)
        for step in space.funnel:
            logger.info("%s", step)
        found = {
            "algorithm_1": planned(chain, device, section, seed=config.seed),
            "random": random_search(
                space, pipeline=pipeline, shared_bytes=shared_bytes, budget=section.population, seed=config.seed
            ),
            "exhaustive": exhaustive_search(space, pipeline=pipeline, shared_bytes=shared_bytes),
        }
        own = _counts(space)
        summary |= own if len(section.devices) == 1 else {f"{name}_{device.name}": n for name, n in own.items()}
        summary |= {f"winner_{device.name}": str(found["algorithm_1"].winner)}
        rows += [Row(provider=device.name, metric=name, unit="count", value=float(n)) for name, n in own.items()]
        rows += [
            Row(provider=f"{device.name}_{way}", metric=metric, unit=unit, value=value)
            for way, result in found.items()
            for metric, unit, value in (
                ("predicted_time", "us", result.best.predicted.total_us),
                ("ranked", "count", float(result.considered)),
            )
        ]
        sections.append(_section(space, found))
    if section.chain == type(section.chain)():
        rows += [
            Row(provider="MCFuser", metric=name, unit="count", value=float(n), kind="paper")
            for name, n in PAPER.items()
        ]
    return launch.Outcome(kind="simulated", rows=tuple(rows), summary=summary, sections=tuple(sections))


def _counts(space: Space) -> dict[str, int]:
    steps = {step.rule.split(",")[0]: step for step in space.funnel}
    return {
        "candidates": steps["all"].candidates,
        "expressions": steps["all"].expressions,
        "after_rule1": steps["rule 1"].expressions,
        "after_rule2": steps["rule 2"].expressions,
        "after_rule3": steps["rule 3"].candidates,
        "after_rule4": steps["rule 4"].candidates,
    }


def _section(space: Space, found: dict[str, Result]) -> Section:
    heights = [math.log10(step.candidates) for step in space.funnel]
    ways = "; ".join(
        f"{way.replace('_', ' ')}: {result.best.predicted.total_us:.2f} us with {result.winner}, "
        f"{result.considered:,} candidates ranked"
        for way, result in found.items()
    )
    rows = []
    for step in space.funnel:
        reasons = "; ".join(f"{number:,}: {reason}" for reason, number in step.dropped[:4])
        more = f"; and {len(step.dropped) - 4} more" if len(step.dropped) > 4 else ""
        rows.append((step.rule, f"{step.expressions}", f"{step.candidates:,}", reasons + more))
    return Section(
        title=f"Funnel on {space.device.name}",
        note=f"{space.chain}. Steps in the table's order. What is found in the rest by the model alone, {ways}.",
        plots=(
            plots.bars(
                {"candidates": heights}, title="Candidates left", x_label="step", y_label="candidates, as a power of 10"
            ),
        ),
        table=Table(headers=("Step", "Expressions", "Candidates", "Dropped"), rows=tuple(rows)),
    )
