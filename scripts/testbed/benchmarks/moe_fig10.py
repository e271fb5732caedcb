"""MPipeMoE figure 10: the share of memory that reuse saves, by two formulas and by our ledger."""

import itertools
import statistics
from dataclasses import dataclass

from configs.schema import Config
from moe_pipeline.config import Restore
from scripts.testbed import launch, plots
from scripts.testbed.benchmarks import moe_equations, moe_paper
from scripts.testbed.benchmarks.moe_paper_layer import account, paper_shape, pipelined
from scripts.testbed.report import Section, Table
from scripts.testbed.rows import Row, headlines

CHUNKS = (2, 4, 8)
STRATEGIES: tuple[Restore, ...] = ("S1", "S2", "S3", "S4")


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One case of the figure."""

    model: str
    num_tokens: int
    num_chunks: int
    equation_6: float
    """Two buffers for T_DI and for T_DO."""
    figure: float
    """One buffer for each: what is plotted."""
    ledger: dict[Restore, float]
    """What our runtime saves of its own memory without reuse, by strategy."""
    ledger_below_equation_4: dict[Restore, float]
    """What it saves of the memory that the paper gives its pipeline without reuse."""


def bench(config: Config, run: launch.Run) -> launch.Outcome:
    """Evaluate both formulas and the ledger for the figure's 36 bars.

    Args:
        config: The run's configuration.
        run: Where to write.
    """
    found = bars()
    rows = []
    for bar in found:
        metric = f"saving_{bar.model}_{bar.num_tokens}_n{bar.num_chunks}"
        rows.append(Row(provider="equation 6", metric=metric, unit="share", value=round(bar.equation_6, 3)))
        rows.append(Row(provider="figure 10", metric=metric, unit="share", value=round(bar.figure, 3), kind="paper"))
        rows += [
            Row(provider=f"{against}, {name}", metric=metric, unit="share", value=value)
            for against, ledger in (("ledger", bar.ledger), ("ledger below equation 4", bar.ledger_below_equation_4))
            for name, value in ledger.items()
        ]
    summary: dict[str, float | int | str | None] = {"bars": len(found)}
    for num_chunks in CHUNKS:
        own = [bar for bar in found if bar.num_chunks == num_chunks]
        for name in STRATEGIES:
            achieved = [bar.ledger_below_equation_4[name] / bar.equation_6 for bar in own]
            summary[f"achieved_{name.lower()}_n{num_chunks}"] = statistics.mean(achieved)
            of_own = [bar.ledger[name] / bar.equation_6 for bar in own]
            summary[f"achieved_of_own_{name.lower()}_n{num_chunks}"] = statistics.mean(of_own)
        summary[f"paper_achieved_n{num_chunks}"] = statistics.mean(moe_paper.ACHIEVED_OVER_THEORY[num_chunks])
    rows += headlines("moe_pipeline", summary)
    return launch.Outcome(kind="simulated", rows=tuple(rows), summary=summary, sections=(_section(found),))


def bars() -> list[Bar]:
    """The figure's bars, model by model."""
    return [
        _bar(model, num_tokens, num_chunks)
        for model, batches in moe_paper.SAVING_TOKENS.items()
        for num_tokens, num_chunks in itertools.product(batches, CHUNKS)
    ]


def _bar(model: str, num_tokens: int, num_chunks: int) -> Bar:
    shape = paper_shape(model, num_tokens)
    width, hidden = shape.d_model, shape.hidden.d_hidden
    states_bytes = shape.element_bytes * moe_equations.states(width, hidden, shape.num_experts)
    printed_bytes = states_bytes + 2 * shape.element_bytes * moe_equations.activations(num_tokens, width, hidden)
    own_bytes = states_bytes + account(shape, pipelined(num_chunks)).activation_bytes
    reused_bytes = {
        name: states_bytes + account(shape, pipelined(num_chunks, name)).activation_bytes for name in STRATEGIES
    }
    return Bar(
        model=model,
        num_tokens=num_tokens,
        num_chunks=num_chunks,
        equation_6=moe_equations.saving_ratio(num_tokens, width, hidden, shape.num_experts, num_chunks),
        figure=moe_equations.single_buffer_saving_ratio(num_tokens, width, num_chunks),
        ledger={name: 1 - num_bytes / own_bytes for name, num_bytes in reused_bytes.items()},
        ledger_below_equation_4={name: 1 - num_bytes / printed_bytes for name, num_bytes in reused_bytes.items()},
    )


def _section(found: list[Bar]) -> Section:
    heights = {
        "equation 6": [bar.equation_6 for bar in found],
        "figure 10": [bar.figure for bar in found],
        "ledger below equation 4, S3": [bar.ledger_below_equation_4["S3"] for bar in found],
    }
    return Section(
        title="Saving of memory reuse",
        note="Formulas and our ledger, on 64 ranks with one expert each; nothing is timed. The paper's theoretical "
        "bars are not its equation 6, which keeps two buffers for T_DI and T_DO, but a formula with one for each. The "
        "ledger's columns are our runtime's saving of the memory that equation 4 gives a pipeline without reuse. Of "
        "its own memory without reuse it saves less, for that is below equation 4 already: gradients of a chunk live "
        "no longer than the chunk. Its rings hold more than equation 5's: rows that are gathered, and a second T_M "
        "where T_M is copied.",
        plots=(plots.bars(heights, title="Share of memory saved", x_label="bar, in the table's order", y_label=""),),
        table=Table(
            headers=("Model", "B", "n", "Equation 6", "Figure 10", *(f"Ledger {s}" for s in STRATEGIES)),
            rows=tuple(
                (
                    *(bar.model, str(bar.num_tokens), str(bar.num_chunks)),
                    *(f"{bar.equation_6:.3f}", f"{bar.figure:.3f}"),
                    *(f"{bar.ledger_below_equation_4[name]:.3f}" for name in STRATEGIES),
                )
                for bar in found
            ),
        ),
    )
