"""The CPU's model against the clock: how it ranks kernels from all of the space, and what its favourites are worth."""

import logging
import statistics
from dataclasses import dataclass

from scipy.stats import spearmanr

from configs.schema import Config
from fusion.plan.cpu_model import CpuModel
from fusion.run.cache import Cache
from scripts.testbed import launch, plots
from scripts.testbed.benchmarks.cpu_candidates import drawn, measured_us, planner
from scripts.testbed.benchmarks.cpu_shapes import searched
from scripts.testbed.instructions import instructions
from scripts.testbed.own_kernels import chain_of
from scripts.testbed.peer_processes.problem import Problem
from scripts.testbed.report import Section, Table
from scripts.testbed.rows import Row, headlines

logger = logging.getLogger(__name__)

FAVOURITES = 5
THREADS = 1  # whose time is known exactly


@dataclass(frozen=True, kw_only=True)
class Case:
    """One chain: what was predicted and measured of every kernel, in us."""

    shape: str
    predicted_us: tuple[float, ...]
    measured_us: tuple[float, ...]
    favourites_us: tuple[float, ...]
    """Measured, of the best of the space by the model, the best first."""

    @property
    def spearman(self) -> float:
        """Correlation of the ranks of drawn kernels."""
        return float(spearmanr(self.predicted_us, self.measured_us).statistic)

    @property
    def best_us(self) -> float:
        """Of all that were measured."""
        return min((*self.measured_us, *self.favourites_us))

    def best_of(self, number: int) -> float:
        """Speed of the fastest of the model's first favourites, relative to the fastest of all.

        Args:
            number: How many favourites.
        """
        return self.best_us / min(self.favourites_us[:number])


def bench(config: Config, run: launch.Run) -> launch.Outcome:
    """Measure kernels of every chain.

    Args:
        config: The run's configuration: `bench.cpu`.
        run: Where to write.

    Raises:
        ConfigError: Where a shape is unknown.
    """
    cache = Cache(run.folder / "winners")
    cases = [_case(name, problem, config, cache) for name, problem in searched(config.bench.cpu).items()]
    summary: dict[str, float | int | str | None] = {
        "spearman_wide": statistics.median(case.spearman for case in cases),
        "spearman_wide_min": min(case.spearman for case in cases),
        "best_of_top1": min(case.best_of(1) for case in cases),
        "best_of_top5": min(case.best_of(FAVOURITES) for case in cases),
        "kernels": sum(len(case.measured_us) for case in cases),
    }
    return launch.Outcome(
        rows=(*(row for case in cases for row in _rows(case)), *headlines("fusion", summary)),
        summary=summary,
        sections=(_section(cases),),
        versions=instructions(),
    )


def _case(name: str, problem: Problem, config: Config, cache: Cache) -> Case:
    chain = chain_of(problem)
    plans = planner(THREADS, cache)
    model = CpuModel(chain, plans.device)
    wide = drawn(chain, plans.device, config.bench.cpu.candidates, seed=config.seed)
    favourites = [schedule for schedule, _ in plans.candidates(chain, FAVOURITES)]
    times_us = measured_us(chain, list(dict.fromkeys([*wide, *favourites])), THREADS)
    case = Case(
        shape=name,
        predicted_us=tuple(model.predict(each).total_us for each in wide if each in times_us),
        measured_us=tuple(times_us[each] for each in wide if each in times_us),
        favourites_us=tuple(times_us[each] for each in favourites if each in times_us),
    )
    logger.info("%-26s spearman %.3f, best of 5 %.3f", name, case.spearman, case.best_of(FAVOURITES))
    return case


def _rows(case: Case) -> list[Row]:
    figures = {
        "spearman": case.spearman,
        "best_of_top1": case.best_of(1),
        "best_of_top5": case.best_of(FAVOURITES),
        "median_over_best": statistics.median(case.measured_us) / case.best_us,
        "worst_over_best": max(case.measured_us) / case.best_us,
    }
    return [
        Row(provider="fusion", metric=f"{name}_{case.shape}", unit="ratio", value=value)
        for name, value in figures.items()
    ]


def _section(cases: list[Case]) -> Section:
    points = {case.shape: (case.measured_us, case.predicted_us) for case in cases}
    table = tuple(
        (
            case.shape,
            str(len(case.measured_us)),
            f"{case.spearman:.3f}",
            f"{case.best_of(1):.3f}",
            f"{case.best_of(FAVOURITES):.3f}",
            f"{statistics.median(case.measured_us) / case.best_us:.2f}",
            f"{max(case.measured_us) / case.best_us:.2f}",
        )
        for case in cases
    )
    return Section(
        title="Predicted and measured",
        note="Kernels drawn from all of the space that the rules leave, each as likely as any other, fp32, one thread. "
        "Best of the model's first: their speed relative to the fastest kernel of all that were measured.",
        plots=(plots.points(points, title="Time of a kernel", x_label="us, measured", y_label="us, predicted"),),
        table=Table(
            headers=("Chain", "Kernels", "Spearman", "Best of 1", "Best of 5", "Median / best", "Worst / best"),
            rows=table,
        ),
    )
