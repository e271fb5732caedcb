"""A layer on clusters that nobody here has: time, memory and plan by number of ranks, simulated on any device file.

Every figure is made with the schedules that the runtime would carry out. Ranks are added while each keeps its tokens,
so only messages grow, and sooner or later they no longer hide behind compute.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from configs.schema import Config
from configs.sections import ClustersSection
from configs.typed import ConfigError
from moe_pipeline import PipelineConfig
from moe_pipeline.plan.budget import Budget, BudgetError
from moe_pipeline.plan.call import plan_call
from moe_pipeline.plan.device import Device, DeviceError, load_device
from moe_pipeline.plan.ledger import LayerShape, balanced_partition
from moe_pipeline.plan.rings import HiddenShape
from moe_pipeline.plan.selector import Candidate, candidates, select, within
from moe_pipeline.plan.simulator import simulate
from scripts.testbed import launch, plots
from scripts.testbed.benchmarks.moe_memory import HIDDEN_PER_WIDTH, PAPER_WIDTHS
from scripts.testbed.report import Section, Table
from scripts.testbed.rows import Row

logger = logging.getLogger(__name__)

HIDDEN_BELOW = 0.05  # messages are hidden where the step is exposed to them for a smaller share
DRAWN_FRONTIERS = 5
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Case:
    """One number of ranks of a device."""

    num_ranks: int
    chosen: Candidate
    """The fastest plan within the budgets."""
    exposed_share: float
    """Part of its step in which messages travel and nothing is computed or copied."""
    frontier: tuple[Candidate, ...]
    """The plans of which none is both smaller and faster, whatever the device budget, smallest first."""


def bench(config: Config, run: launch.Run) -> launch.Outcome:
    """Simulate every number of ranks of every device.

    Args:
        config: The run's configuration; `bench.clusters` names the devices, the ranks, the layer and the budgets.
        run: Where to write.

    Raises:
        ConfigError: Where a device cannot be read, or no plan fits the budgets.
    """
    section = config.bench.clusters
    rows: list[Row] = []
    summary: dict[str, float | int | str | None] = {}
    cases: dict[str, list[Case]] = {}
    pages = []
    for name in section.devices:
        device = _device(section, name)
        budget = within(device, section.device_budget_bytes, section.host_budget_bytes)
        cases[device.name] = [_simulate(section, device, budget, num_ranks) for num_ranks in sorted(section.ranks)]
        rows += [row for case in cases[device.name] for row in _rows(device.name, case)]
        summary |= _summary(device.name, cases[device.name])
        pages.append(_section(device, budget, cases[device.name]))
    return launch.Outcome(
        kind="simulated", rows=tuple(rows), summary=summary, sections=(_overview(section, cases), *pages)
    )


def _device(section: ClustersSection, name: str) -> Device:
    try:
        device = load_device(name)
    except DeviceError as error:
        raise ConfigError(f"bench.clusters.devices: {error}") from error
    if section.node_gbit is not None:
        device = with_node_rate(device, section.node_gbit)
    if section.peer_us is not None:
        device = with_peer_latency(device, section.peer_us)
    return device


def with_node_rate(device: Device, node_gbit: float) -> Device:
    """The same device with another link between nodes.

    Args:
        device: Any.
        node_gbit: Rate of one rank at large volumes, in Gbit/s; at others it is lower as it is in the file.
    """
    speed = device.node_message
    scale = node_gbit * 1e9 / 8 / speed.points[-1][1]
    points = tuple((volume, rate * scale) for volume, rate in speed.points)
    return replace(
        device,
        name=f"{device.name}_{node_gbit:g}gbit",
        origin=f"{device.origin} Assumed here: {node_gbit:g} Gbit/s of each rank to other nodes.",
        node_message=replace(speed, points=points),
    )


def with_peer_latency(device: Device, peer_us: float) -> Device:
    """The same device with another latency of large all-to-alls.

    Args:
        device: Any.
        peer_us: What each further rank adds.
    """
    return replace(
        device,
        name=f"{device.name}_{peer_us:g}us",
        origin=f"{device.origin} Assumed here: each further rank adds {peer_us:g} us to an all-to-all.",
        peer_us=peer_us,
    )


def layer_shape(section: ClustersSection, num_ranks: int) -> LayerShape:
    """The layer on a number of ranks.

    Args:
        section: Its sizes.
        num_ranks: N.
    """
    width, d_hidden = section.d_model, section.d_hidden
    if section.model is not None:
        width = PAPER_WIDTHS[section.model]
        d_hidden = HIDDEN_PER_WIDTH * width
    return LayerShape(
        tokens=section.num_tokens,
        top_k=section.top_k,
        d_model=width,
        hidden=HiddenShape(d_hidden=d_hidden, gated=section.gated, in_place=not section.gated),
        num_experts=num_ranks if section.num_experts is None else section.num_experts,
        num_ranks=num_ranks,
    )


def _simulate(section: ClustersSection, device: Device, budget: Budget, num_ranks: int) -> Case:
    shape = layer_shape(section, num_ranks)
    found = candidates(shape, device, budget=budget)
    try:
        chosen = select(found, budget)
    except BudgetError as error:
        raise ConfigError(f"bench.clusters: {device.name} with {num_ranks} ranks: {error}") from error
    config = PipelineConfig(num_chunks=chosen.num_chunks, restore=chosen.restore)
    timeline = simulate(plan_call("clusters", config, balanced_partition(shape, config)), shape, device)
    case = Case(
        num_ranks=num_ranks,
        chosen=chosen,
        exposed_share=timeline.exposed_us / chosen.predicted_us,
        frontier=frontier([one for one in found if not one.unwise and _fits_host(one, budget)]),
    )
    logger.info("%-16s %5d ranks  %s  %4.1f %% exposed", device.name, num_ranks, chosen, 100 * case.exposed_share)
    return case


def _fits_host(one: Candidate, budget: Budget) -> bool:
    return not one.footprint.missing(Budget(host_bytes=budget.host_bytes))


def frontier(found: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The candidates of which no other is both smaller and faster.

    Args:
        found: Any.

    Returns:
        Them from the smallest and slowest to the largest and fastest.
    """
    best: list[Candidate] = []
    for one in sorted(found, key=lambda one: (one.footprint.device_bytes, one.predicted_us)):
        if not best or one.predicted_us < best[-1].predicted_us:
            best.append(one)
    return tuple(best)


def hidable_up_to_ranks(cases: Sequence[Case]) -> int | None:
    """The largest number of ranks whose messages are hidden; None where those of no number are.

    Args:
        cases: One for each number of ranks.
    """
    return max((case.num_ranks for case in cases if case.exposed_share < HIDDEN_BELOW), default=None)


def _plan(one: Candidate) -> str:
    return f"n{one.num_chunks}_{one.restore}"


def _summary(device: str, cases: Sequence[Case]) -> Mapping[str, float | int | str | None]:
    fewest, most = cases[0], cases[-1]
    return {
        f"{device}_hidable_up_to_ranks": hidable_up_to_ranks(cases),
        f"{device}_step_ms_{fewest.num_ranks}": fewest.chosen.predicted_us / 1e3,
        f"{device}_step_ms_{most.num_ranks}": most.chosen.predicted_us / 1e3,
        f"{device}_exposed_share_{most.num_ranks}": most.exposed_share,
        f"{device}_plan_{most.num_ranks}": _plan(most.chosen),
    }


def _rows(device: str, case: Case) -> list[Row]:
    chosen, footprint, ranks = case.chosen, case.chosen.footprint, case.num_ranks
    figures = [
        ("step_time", "ms", chosen.predicted_us / 1e3),
        ("exposed_share", "ratio", case.exposed_share),
        ("device_memory", "MiB", footprint.device_bytes / MIB),
        ("host_memory", "MiB", footprint.host_bytes / MIB),
        ("num_chunks", "chunks", float(chosen.num_chunks)),
        ("strategy", "0: none, 1-4: S1-S4", float(chosen.restore.removeprefix("S").replace("none", "0"))),
    ]
    rows = [Row(provider=device, metric=f"{name}_{ranks}", unit=unit, value=value) for name, unit, value in figures]
    for one in case.frontier:
        provider = f"{device}_{_plan(one)}"
        memory, time = one.footprint.device_bytes / MIB, one.predicted_us / 1e3
        rows.append(Row(provider=provider, metric=f"frontier_memory_{ranks}", unit="MiB", value=memory))
        rows.append(Row(provider=provider, metric=f"frontier_time_{ranks}", unit="ms", value=time))
    return rows


def _overview(section: ClustersSection, cases: Mapping[str, Sequence[Case]]) -> Section:
    shape = layer_shape(section, section.ranks[0])
    experts = "one expert a rank" if section.num_experts is None else f"{section.num_experts} experts"
    x_label = "ranks, as a power of 2"
    powers = {device: [math.log2(case.num_ranks) for case in own] for device, own in cases.items()}
    times = {
        device: (powers[device], [case.chosen.predicted_us / 1e3 for case in own]) for device, own in cases.items()
    }
    shares = {device: (powers[device], [100 * case.exposed_share for case in own]) for device, own in cases.items()}
    hidable = "; ".join(f"{device}: {hidable_up_to_ranks(own) or 'none'}" for device, own in cases.items())
    return Section(
        title="Where messages stop being hidden",
        note=f"Simulated. {section.model or 'A layer'}, {shape.tokens:,} tokens a rank x {shape.d_model}, hidden "
        f"{shape.hidden.d_hidden}, {experts}, top {shape.top_k}; rows are spread equally over experts. Messages are "
        f"hidden where less than {HIDDEN_BELOW:.0%} of a step is spent on them alone; largest number of ranks for "
        f"which they are: {hidable}.",
        plots=(
            plots.curves(times, title="Step of the chosen plan", x_label=x_label, y_label="ms (simulated)"),
            plots.curves(shares, title="Exposed messages", x_label=x_label, y_label="% of the step (simulated)"),
        ),
    )


def _section(device: Device, budget: Budget, cases: Sequence[Case]) -> Section:
    step = -(-len(cases) // DRAWN_FRONTIERS)
    drawn = {
        f"{case.num_ranks:,} ranks": (
            [one.footprint.device_bytes / MIB for one in case.frontier],
            [one.predicted_us / 1e3 for one in case.frontier],
        )
        for case in cases[::-1][::step][::-1]
    }
    table = Table(
        headers=("Ranks", "Plan", "Step", "Exposed", "Device", "Host", "Frontier, smallest first"),
        rows=tuple(
            (
                f"{case.num_ranks:,}",
                f"n={case.chosen.num_chunks} {case.chosen.restore}",
                f"{case.chosen.predicted_us / 1e3:,.2f} ms",
                f"{case.exposed_share:.1%}",
                f"{case.chosen.footprint.device_bytes / MIB:,.0f} MiB",
                f"{case.chosen.footprint.host_bytes / MIB:,.0f} MiB",
                ", ".join(f"{_plan(one)} {one.footprint.device_bytes / MIB:,.0f} MiB" for one in case.frontier),
            )
            for case in cases
        ),
    )
    return Section(
        title=device.name,
        note=f"{device.origin} Each further rank adds {device.peer_us:g} us to an all-to-all, whose rate depends on "
        "what a rank sends in all, not on how little of it each peer gets. Budgets of one layer: "
        f"{budget.device_bytes:,} bytes on the device, {budget.host_bytes:,} on the host; the frontier keeps to the "
        "host's alone.",
        plots=(
            plots.curves(
                drawn, title="Frontier of memory and time", x_label="MiB on the device", y_label="ms (simulated)"
            ),
        ),
        table=table,
    )
