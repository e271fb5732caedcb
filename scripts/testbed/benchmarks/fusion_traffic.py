"""Traffic: the bytes that the chosen kernel of every shape loads and stores, against other ways to run the chain."""

import statistics
from dataclasses import dataclass

from configs.kernels import KernelsSection
from configs.schema import Config
from fusion import Chain
from fusion.plan.device import Device
from fusion.plan.schedule import Schedule
from fusion.plan.traffic import Traffic, naive_program, traffic, unfused_bytes
from scripts.testbed import launch, plots
from scripts.testbed.benchmarks.fusion_plans import chains_on_devices, planned, unfused
from scripts.testbed.report import Section, Table
from scripts.testbed.rows import Row, headlines

KIB = 1024


@dataclass(frozen=True, kw_only=True)
class Case:
    """One chain on one device; all figures are bytes."""

    device: str
    shape: str
    schedule: Schedule
    fused: Traffic
    naive: int
    """The same schedule with loads and stores in the loops of their products: Chimera's placement."""
    chimera: int
    """The best schedule of Chimera's space, in Chimera's placement."""
    unfused: int
    """A kernel for each stage, as PyTorch runs them eagerly, the products chosen by the same search."""
    unfused_least: int
    """A kernel for each product and softmax that reads each of its operands once: no tiles do better."""

    def saved(self, other: int) -> float:
        """What the fused kernel moves less, as a share of the other's bytes; negative where it moves more."""
        return 1 - self.fused.bytes / other


def bench(config: Config, run: launch.Run) -> launch.Outcome:
    """Count the bytes of every shape's kernel.

    Args:
        config: The run's configuration: `bench.kernels`.
        run: Where to write.

    Raises:
        ConfigError: Where a device cannot be used or a shape is unknown.
    """
    section = config.bench.kernels
    found, pairs = chains_on_devices(section, argument="bench.kernels")
    cases = [_case(name, chain, device, section, seed=config.seed) for name, chain, device in pairs]
    sections = tuple(
        _section(
            device, {name: chain for name, chain, _ in pairs}, [case for case in cases if case.device == device.name]
        )
        for device in found
    )
    summary = _summary(cases)
    return launch.Outcome(
        kind="simulated",
        rows=(*(row for case in cases for row in _rows(case)), *headlines("fusion", summary)),
        summary=summary,
        sections=sections,
    )


def _case(name: str, chain: Chain, device: Device, section: KernelsSection, *, seed: int) -> Case:
    winner = planned(chain, device, section, seed=seed).winner
    nested = planned(chain, device, section, seed=seed, kind="chimera").winner
    return Case(
        device=device.name,
        shape=name,
        schedule=winner,
        fused=traffic(chain, winner.program(chain), dict(winner.tiles)),
        naive=_naively(chain, winner),
        chimera=_naively(chain, nested),
        unfused=sum(kernel.moved_bytes for kernel in unfused(chain, device, section, seed=seed)),
        unfused_least=unfused_bytes(chain),
    )


def _naively(chain: Chain, schedule: Schedule) -> int:
    return traffic(chain, naive_program(chain, schedule), dict(schedule.tiles)).bytes


def _others(case: Case) -> dict[str, int]:
    return {
        "unfused": case.unfused,
        "unfused_least": case.unfused_least,
        "naive_placement": case.naive,
        "chimera": case.chimera,
    }


def _summary(cases: list[Case]) -> dict[str, float | int | str | None]:
    names = list(_others(cases[0]))
    median = {
        f"median_saved_vs_{name}": statistics.median(case.saved(_others(case)[name]) for case in cases)
        for name in names
    }
    least = {
        f"least_saved_vs_{name}": min(case.saved(_others(case)[name]) for case in cases) for name in names
    }  # fmt: skip
    return {"cases": len(cases), **median, **least}


def _rows(case: Case) -> list[Row]:
    counted = {"fused": case.fused.bytes, **_others(case)}
    rows = [
        Row(provider=f"{case.device}_{name}", metric=f"moved_{case.shape}", unit="bytes", value=float(value))
        for name, value in counted.items()
    ]
    saved = [
        Row(provider=f"{case.device}_fused", metric=f"saved_vs_{name}_{case.shape}", unit="ratio", value=case.saved(v))
        for name, v in _others(case).items()
    ]
    return rows + saved


def _section(device: Device, chains: dict[str, Chain], cases: list[Case]) -> Section:
    bars = {
        "unfused, stage by stage": [case.unfused / case.fused.bytes for case in cases],
        "unfused, each operand once": [case.unfused_least / case.fused.bytes for case in cases],
        "same schedule, naive placement": [case.naive / case.fused.bytes for case in cases],
        "Chimera's space and placement": [case.chimera / case.fused.bytes for case in cases],
    }
    rows = tuple(
        (
            case.shape,
            str(case.schedule),
            f"{chains[case.shape].io_bytes / KIB:,.0f}",
            *(f"{value / KIB:,.0f}" for value in (case.fused.bytes, *_others(case).values())),
            ", ".join(f"{one.statement} {one.bytes / KIB:,.0f}" for one in case.fused.moved),
        )
        for case in cases
    )
    return Section(
        title=f"Bytes moved on {device.name}",
        note="Counted exactly: tiles at an edge move what exists of them. A block loads what it needs itself, so an "
        "operand that several blocks need is counted for each; caches may serve some of that. Least traffic is every "
        "input once and the output once. Unfused is a kernel for each stage; at least, a kernel for each product and "
        "softmax that reads each operand once, as if caches held all of it.",
        plots=(
            plots.bars(bars, title="Relative to the fused kernel", x_label="shape, in the table's order", y_label="x"),
        ),
        table=Table(
            headers=(
                "Shape", "Schedule", "Least (KiB)", "Fused", "Unfused", "Unfused, least", "Naive placement", "Chimera",
                "Fused, by statement",
            ),
            rows=rows,
        ),
    )  # fmt: skip
