"""Predicted speed of fused kernels over unfused ones, by the paper's model, beside the bars of its Figure 8.

PyTorch runs one kernel for each stage, and at the figure's sizes it takes longer to start one than to run it. The model
does not know that, so a least time of a kernel is assumed on both sides, and the speed without it stands beside.
"""

import logging
import statistics
from dataclasses import dataclass

from scipy.stats import spearmanr

from configs.kernels import KernelsSection
from configs.schema import Config
from fusion import Chain
from fusion.plan.device import Device
from fusion.plan.intensity import intensity
from fusion.run.triton.executor import LEAST_US
from scripts.testbed import launch, plots
from scripts.testbed.benchmarks import fusion_paper
from scripts.testbed.benchmarks.fusion_plans import chains_on_devices, planned, unfused
from scripts.testbed.benchmarks.fusion_shapes import GEMM_CHAINS, SELF_ATTENTION
from scripts.testbed.report import Section, Table
from scripts.testbed.rows import Row, headlines

logger = logging.getLogger(__name__)

EAGER_US = 8.0  # assumed: what an operation of PyTorch takes at least, most of it on the CPU
LAUNCH_US = LEAST_US  # assumed likewise, of a compiled kernel
OURS, NESTED = "MCFuser", "MCFuser-Chimera"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One chain on one device."""

    device: str
    shape: str
    """Our name of it."""
    label: str
    """The paper's name, or ours where it has none."""
    group: str
    fused_us: float
    nested_us: float
    """The best of Chimera's space."""
    unfused_us: tuple[float, ...]
    """Of each kernel."""
    is_mbci: bool
    schedule: str
    paper: dict[str, float]
    """Method -> speed over PyTorch in the figure."""

    @property
    def speedup(self) -> float:
        """Fused over unfused where no kernel is shorter than it takes to start one."""
        return self._eager_us / max(self.fused_us, LAUNCH_US)

    @property
    def nested_speedup(self) -> float:
        """The same in Chimera's space."""
        return self._eager_us / max(self.nested_us, LAUNCH_US)

    @property
    def busy_speedup(self) -> float:
        """By the model alone: what is gained where kernels start at once, as in a CUDA graph."""
        return sum(self.unfused_us) / self.fused_us

    @property
    def _eager_us(self) -> float:
        return sum(max(time_us, EAGER_US) for time_us in self.unfused_us)


def bench(config: Config, run: launch.Run) -> launch.Outcome:
    """Plan every shape on every device, fused and unfused.

    Args:
        config: The run's configuration: `bench.kernels`.
        run: Where to write.

    Raises:
        ConfigError: Where a device cannot be used or a shape is unknown.
    """
    section = config.bench.kernels
    found, pairs = chains_on_devices(section, argument="bench.kernels")
    cases = [_case(name, chain, device, section, seed=config.seed) for name, chain, device in pairs]
    summary = _summary(cases)
    return launch.Outcome(
        kind="simulated",
        rows=(*(row for case in cases for row in _rows(case)), *headlines("fusion", summary)),
        summary=summary,
        sections=tuple(_section(device, [case for case in cases if case.device == device.name]) for device in found),
    )


def _case(name: str, chain: Chain, device: Device, section: KernelsSection, *, seed: int) -> Case:
    fused = planned(chain, device, section, seed=seed)
    nested = planned(chain, device, section, seed=seed, kind="chimera")
    apart = unfused(chain, device, section, seed=seed)
    group = "gemm" if name in GEMM_CHAINS else "attention"
    label = next((label for label, shape in SELF_ATTENTION.items() if shape == name), name)
    case = Case(
        device=device.name,
        shape=name,
        label=label,
        group=group,
        fused_us=fused.best.predicted.total_us,
        nested_us=nested.best.predicted.total_us,
        unfused_us=tuple(kernel.busy_us for kernel in apart),
        is_mbci=intensity(chain, device).is_mbci,
        schedule=str(fused.winner),
        paper=fusion_paper.bars(device.name, group).get(label, {}),
    )
    logger.info("%-8s %-16s %5.2f x, without launches %5.2f x", device.name, label, case.speedup, case.busy_speedup)
    return case


def rank_correlation(cases: list[Case]) -> float | None:
    """Spearman's correlation of our speed with the figure's, over the shapes that have a bar.

    Args:
        cases: Any; fewer than three with a bar have none.
    """
    pairs = [(case.speedup, case.paper[OURS]) for case in cases if OURS in case.paper]
    if len(pairs) < 3:
        return None
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def _summary(cases: list[Case]) -> dict[str, float | int | str | None]:
    groups = dict.fromkeys((case.device, case.group) for case in cases)
    summary: dict[str, float | int | str | None] = {"rank_correlation": rank_correlation(cases)}
    for device, group in groups:
        own = [case for case in cases if (case.device, case.group) == (device, group)]
        printed = [case.paper[OURS] for case in own if OURS in case.paper]
        summary[f"rank_correlation_{device}_{group}"] = rank_correlation(own)
        summary[f"geomean_speedup_{device}_{group}"] = statistics.geometric_mean(case.speedup for case in own)
        summary[f"geomean_busy_speedup_{device}_{group}"] = statistics.geometric_mean(c.busy_speedup for c in own)
        if printed:
            summary[f"paper_geomean_speedup_{device}_{group}"] = statistics.geometric_mean(printed)
    return summary


def _rows(case: Case) -> list[Row]:
    figures = {
        "speedup": ("x", case.speedup),
        "speedup_without_launches": ("x", case.busy_speedup),
        "fused_time": ("us", case.fused_us),
        "unfused_time": ("us", sum(case.unfused_us)),
    }
    rows = [
        Row(provider=f"{case.device}_{OURS}", metric=f"{name}_{case.label}", unit=unit, value=value)
        for name, (unit, value) in figures.items()
    ]
    rows.append(
        Row(provider=f"{case.device}_{NESTED}", metric=f"speedup_{case.label}", unit="x", value=case.nested_speedup)
    )
    rows += [
        Row(provider=f"{case.device}_{method}, paper", metric=f"speedup_{case.label}", unit="x", value=s, kind="paper")
        for method, s in case.paper.items()
    ]
    return rows


def _section(device: Device, cases: list[Case]) -> Section:
    bars = {
        OURS: [case.speedup for case in cases],
        f"{OURS}, without launches": [case.busy_speedup for case in cases],
        f"{OURS}, paper": [case.paper.get(OURS, 0.0) for case in cases],
    }
    worst = [case.label for case in cases if case.busy_speedup < 1]
    loses = f"Fusing loses without launches on {', '.join(worst)}. " if worst else ""
    return Section(
        title=f"Speed over unfused kernels on {device.name}",
        note="Simulated: the paper's model on both sides. Assumed: an operation of PyTorch takes at least "
        f"{EAGER_US:g} us, a compiled kernel {LAUNCH_US:g} us; without launches is the model alone. Unfused is a "
        "kernel for each stage, the products planned by the same search. The paper's bars are measured against PyTorch "
        f"of its time; the shapes behind its names are not known. {loses}The model counts every load of every block "
        "at the memory's bandwidth, as if caches held nothing, and slows down what has few blocks, as a fused chain "
        "has: it is made to rank the candidates of one chain, and says less about two chains.",
        plots=(plots.bars(bars, title="Speed", x_label="shape, in the table's order", y_label="x"),),
        table=Table(
            headers=("Shape", "Stands for", "MBCI", "Schedule", "Fused", "Unfused", "Speed", "No launches",
                     "Chimera's space", "Paper", "Paper, Chimera"),
            rows=tuple(
                (
                    case.shape,
                    case.label,
                    "yes" if case.is_mbci else "no",
                    case.schedule,
                    f"{case.fused_us:.1f} us",
                    f"{sum(case.unfused_us):.1f} us",
                    f"{case.speedup:.2f}",
                    f"{case.busy_speedup:.2f}",
                    f"{case.nested_speedup:.2f}",
                    f"{case.paper[OURS]:.1f}" if OURS in case.paper else "",
                    f"{case.paper[NESTED]:.1f}" if NESTED in case.paper else "",
                )
                for case in cases
            ),
        ),
    )  # fmt: skip
