"""MPipeMoE figure 13 on the papers' cluster: what each restore strategy costs, and whether the selector takes the best.

Our picks are judged by the overheads that the paper measured, not by our own predictions of them.
"""

import statistics
from dataclasses import dataclass, replace

from configs.schema import Config
from moe_pipeline.config import Restore
from moe_pipeline.plan.device import Device, Speed, load_device
from moe_pipeline.plan.ledger import LayerShape
from moe_pipeline.plan.selector import candidates, select
from scripts.testbed import launch, plots
from scripts.testbed.benchmarks import moe_paper
from scripts.testbed.benchmarks.moe_paper_layer import CLUSTER, best_chunks, paper_shape, pipelined, time_us
from scripts.testbed.report import Section, Table
from scripts.testbed.rows import Row, headlines

MODEL = "MoE-GPT3-XL"
STRATEGIES: tuple[Restore, ...] = ("S1", "S2", "S3", "S4")
OTHER_COPIES_BYTES = (16e9, 20e9, 22e9, 26e9, 28e9, 31.5e9)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One group of the figure's bars."""

    num_ranks: int
    num_tokens: int
    num_chunks: int
    predicted_percent: dict[Restore, float]
    """Strategy -> simulated time over that without reuse."""
    picked: Restore

    @property
    def measured_percent(self) -> dict[Restore, float]:
        """The paper's bars."""
        return moe_paper.OVERHEAD_PERCENT[self.num_ranks, self.num_tokens]

    @property
    def pick_percent(self) -> float:
        """What the pick costs by the paper's bars."""
        return self.measured_percent[self.picked]


def bench(config: Config, run: launch.Run) -> launch.Outcome:
    """Simulate every strategy in the figure's twelve cases, and let the selector pick.

    Args:
        config: The run's configuration.
        run: Where to write.
    """
    device = load_device(CLUSTER)
    found = cases(device)
    summary: dict[str, float | int | str | None] = {
        "mean_overhead_percent": mean_overhead(found),
        "matches_paper": sum(case.picked == moe_paper.CHOSEN[case.num_ranks, case.num_tokens] for case in found),
        "paper_mean_overhead_percent": statistics.mean(
            moe_paper.OVERHEAD_PERCENT[key][chosen] for key, chosen in moe_paper.CHOSEN.items()
        ),
        "paper_oracle_percent": statistics.mean(min(case.measured_percent.values()) for case in found),
        "paper_best_fixed_percent": min(
            statistics.mean(case.measured_percent[s] for case in found) for s in STRATEGIES
        ),
        "searched_chunks_mean_overhead_percent": mean_overhead(cases(device, search=True)),
        "one_expert_a_rank_mean_overhead_percent": mean_overhead(cases(device, one_expert=True)),
        "overhead_median_error_points": statistics.median(
            abs(case.predicted_percent[s] - case.measured_percent[s]) for case in found for s in STRATEGIES
        ),
    }
    return launch.Outcome(
        kind="simulated",
        rows=(*(row for case in found for row in _rows(case)), *headlines("moe_pipeline", summary)),
        summary=summary,
        sections=(_section(device, found), _sensitivity(device)),
    )


def cases(device: Device, *, search: bool = False, one_expert: bool = False) -> list[Case]:
    """The figure's cases, each with the selector's pick among S1 to S4.

    Args:
        device: Where.
        search: Whether the number of chunks is the fastest in the simulation of each case; else it is the paper's for
            the batch, whatever the number of ranks.
        one_expert: Whether every rank has one expert; else 64 are spread over all ranks, as in Table III.
    """
    found = []
    for num_ranks, num_tokens in moe_paper.OVERHEAD_PERCENT:
        experts = num_ranks if one_expert else moe_paper.NUM_EXPERTS
        shape = paper_shape(MODEL, num_tokens, num_ranks=num_ranks, num_experts=experts)
        num_chunks = best_chunks(shape, device) if search else moe_paper.paper_chunks(num_tokens)
        found.append(_case(shape, device, num_chunks))
    return found


def mean_overhead(found: list[Case]) -> float:
    """What the picks cost on average, by the paper's bars.

    Args:
        found: The cases.
    """
    return statistics.mean(case.pick_percent for case in found)


def _case(shape: LayerShape, device: Device, num_chunks: int) -> Case:
    base_us = time_us(shape, pipelined(num_chunks), device)
    found = candidates(shape, device, chunk_counts=(num_chunks,), restores=STRATEGIES)
    return Case(
        num_ranks=shape.num_ranks,
        num_tokens=shape.tokens,
        num_chunks=num_chunks,
        predicted_percent={one.restore: 100 * (one.predicted_us / base_us - 1) for one in found},
        picked=select(found).restore,
    )


def _rows(case: Case) -> list[Row]:
    metric = f"overhead_{case.num_ranks}_ranks_{case.num_tokens}"
    ours = [Row(provider=s, metric=metric, unit="%", value=case.predicted_percent[s]) for s in STRATEGIES]
    paper = [
        Row(provider=f"{s}, paper", metric=metric, unit="%", value=case.measured_percent[s], kind="paper")
        for s in STRATEGIES
    ]
    pick = Row(provider="selector", metric=f"pick_{metric}", unit="%", value=case.pick_percent)
    return [*ours, *paper, pick]


def _section(device: Device, found: list[Case]) -> Section:
    bars = {f"{s}, {name}": _heights(found, s, name) for s in STRATEGIES for name in ("ours", "paper")}
    return Section(
        title="Overhead of the strategies and the selector's pick",
        note="Simulated, MoE-GPT3-XL with 64 experts over N ranks; the time of a step over that without reuse. The "
        "number of chunks is the paper's for the batch. Nothing here was fitted on this figure. The selector's mean "
        "is of the paper's bars at our picks. What the paper does not say of this figure was taken as it stands "
        "elsewhere in it, and matters: 64 experts in all (Table III), of which a rank among few holds several, each "
        "with smaller products; and chunks by batch alone (section V-F). The summary has the mean for one expert a "
        "rank, and for chunks searched in each case.",
        plots=(plots.bars(bars, title="Overhead", x_label="case, in the table's order", y_label="%"),),
        table=Table(
            headers=("N", "B", "n", *STRATEGIES, *(f"paper {s}" for s in STRATEGIES), "Pick", "Paper's pick"),
            rows=tuple(
                (
                    *(str(value) for value in (case.num_ranks, case.num_tokens, case.num_chunks)),
                    *(f"{case.predicted_percent[s]:.1f}" for s in STRATEGIES),
                    *(f"{case.measured_percent[s]:.1f}" for s in STRATEGIES),
                    case.picked,
                    moe_paper.CHOSEN[case.num_ranks, case.num_tokens],
                )
                for case in found
            ),
        ),
    )


def _heights(found: list[Case], name: Restore, whose: str) -> list[float]:
    return [(case.predicted_percent if whose == "ours" else case.measured_percent)[name] for case in found]


def _sensitivity(device: Device) -> Section:
    """How much the picks depend on what is assumed: the rate of copies."""
    rates = sorted({device.copy.points[0][1], *OTHER_COPIES_BYTES})
    rows = []
    for rate in rates:
        found = cases(replace(device, copy=Speed(device.copy.latency_us, ((1.0, rate),))))
        picks = " ".join(case.picked for case in found)
        rows.append((f"{rate / 1e9:g} GB/s", f"{mean_overhead(found):.2f} %", picks))
    return Section(
        title="If copies were slower or faster",
        note="The one assumed speed that decides: the device's own rate is 24 GB/s. Slower copies favour S4, faster "
        "ones S2, in all cases at once.",
        table=Table(headers=("Copies", "Mean overhead", "Picks"), rows=tuple(rows)),
    )
