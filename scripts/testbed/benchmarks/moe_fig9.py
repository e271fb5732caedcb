"""MPipeMoE figure 9: memory of FasterMoE, PipeMoE and MPipeMoE over FastMoE's, by equations and by our ledger."""

import statistics

from configs.schema import Config
from scripts.testbed import launch, plots
from scripts.testbed.benchmarks import moe_equations, moe_paper
from scripts.testbed.benchmarks.moe_paper_layer import (
    SEQUENTIAL,
    account,
    one_rank_at_a_time,
    paper_shape,
    pipelined,
)
from scripts.testbed.report import Section, Table
from scripts.testbed.rows import Row, headlines

METHODS = tuple(moe_paper.MEMORY_OVER_FASTMOE)
SINGLE = "MPipeMoE, single buffers"
Ratios = dict[str, tuple[float, ...]]


def bench(config: Config, run: launch.Run) -> launch.Outcome:
    """Work out the figure's nine cases.

    Args:
        config: The run's configuration.
        run: Where to write.
    """
    tables: dict[str, Ratios] = {
        "equations": _columns([by_equations(*point) for point in moe_paper.POINTS]),
        "ledger": _columns([by_ledger(*point) for point in moe_paper.POINTS]),
        "paper": moe_paper.MEMORY_OVER_FASTMOE,
    }
    summary: dict[str, float | int | str | None] = {
        "median_error": statistics.median(e for name in METHODS for e in _errors(tables["equations"], name)),
        **{f"median_error_{name.lower()}": statistics.median(_errors(tables["equations"], name)) for name in METHODS},
        "median_error_mpipemoe_single_buffers": statistics.median(_errors(tables["equations"], SINGLE)),
        "median_error_ledger": statistics.median(e for name in METHODS for e in _errors(tables["ledger"], name)),
        **{f"mean_{name.lower()}": statistics.mean(tables["equations"][name]) for name in METHODS},
        **{f"mean_ledger_{name.lower()}": statistics.mean(tables["ledger"][name]) for name in METHODS},
        **{f"paper_mean_{name.lower()}": statistics.mean(tables["paper"][name]) for name in METHODS},
    }
    rows = [
        Row(
            provider=f"{name}, {whose}",
            metric=f"memory_over_fastmoe_{model}_{num_tokens}",
            unit="x",
            value=table[name][index],
            kind="paper" if whose == "paper" else None,
        )
        for whose, table in tables.items()
        for name in METHODS
        for index, (model, num_tokens) in enumerate(moe_paper.POINTS)
    ]
    rows += headlines("moe_pipeline", summary)
    return launch.Outcome(kind="simulated", rows=tuple(rows), summary=summary, sections=(_section(tables),))


def by_equations(model: str, num_tokens: int) -> dict[str, float]:
    """Memory over FastMoE's by equations 1-5.

    Args:
        model: A name of Table III.
        num_tokens: B.
    """
    shape = paper_shape(model, num_tokens)
    width, hidden, num_chunks = shape.d_model, shape.hidden.d_hidden, moe_paper.paper_chunks(num_tokens)
    states = moe_equations.states(width, hidden, shape.num_experts)
    kept = moe_equations.activations(num_tokens, width, hidden)
    fastmoe = states + kept + moe_equations.sequential_buffers(num_tokens, width, hidden)
    pipemoe = states + 2 * kept
    mpipemoe = pipemoe - 2 * moe_equations.saved_by_reuse(num_tokens, width, hidden, num_chunks)
    single = 1 - moe_equations.single_buffer_saving_ratio(num_tokens, width, num_chunks)
    return {
        "FasterMoE": pipemoe / fastmoe,
        "PipeMoE": pipemoe / fastmoe,
        "MPipeMoE": mpipemoe / fastmoe,
        SINGLE: single * pipemoe / fastmoe,
    }


def by_ledger(model: str, num_tokens: int) -> dict[str, float]:
    """Memory over FastMoE's as our runtime allocates it.

    Args:
        model: A name of Table III.
        num_tokens: B.
    """
    shape = paper_shape(model, num_tokens)
    states_bytes = shape.element_bytes * moe_equations.states(shape.d_model, shape.hidden.d_hidden, shape.num_experts)
    num_chunks = moe_paper.paper_chunks(num_tokens)
    configs = {
        "FasterMoE": one_rank_at_a_time(),
        "PipeMoE": pipelined(num_chunks),
        "MPipeMoE": pipelined(num_chunks, "S3"),
    }
    fastmoe_bytes = states_bytes + account(shape, SEQUENTIAL).activation_bytes
    return {
        name: (states_bytes + account(shape, config).activation_bytes) / fastmoe_bytes
        for name, config in configs.items()
    }


def _columns(cases: list[dict[str, float]]) -> Ratios:
    return {name: tuple(case[name] for case in cases) for name in cases[0]}


def _errors(table: Ratios, name: str) -> list[float]:
    printed = moe_paper.MEMORY_OVER_FASTMOE[name.split(",")[0]]
    return [abs(ours / paper - 1) for ours, paper in zip(table[name], printed, strict=True)]


def _section(tables: dict[str, Ratios]) -> Section:
    bars = {f"{name}, {whose}": tables[whose][name] for name in METHODS for whose in ("equations", "paper")}
    return Section(
        title="Memory over FastMoE",
        note="Adam's states, activations and buffers on 64 ranks with one expert each; nothing is fitted or timed. The "
        "number of chunks is the paper's for the batch. Equations: FastMoE by 1-3, PipeMoE by 4, MPipeMoE by 5, and "
        "FasterMoE as a pipeline that keeps all gradients too. With single buffers, as the formula of figure 10 has "
        "them, MPipeMoE comes closer to the paper's bars at 4k tokens, where two buffers of two chunks save nothing "
        "of T_DI and T_DO. Ledger: the same for our runtime, MPipeMoE with S3; "
        "there a pipeline takes less than one chunk does, for the gradients of a chunk are given back when it is "
        "over, and equation 4 keeps them all.",
        plots=(plots.bars(bars, title="Memory over FastMoE", x_label="case, in the table's order", y_label="x"),),
        table=Table(
            headers=("Model", "B", *(f"{name}, {whose}" for name in METHODS for whose in tables), SINGLE),
            rows=tuple(
                (
                    *(model, str(num_tokens)),
                    *(f"{table[name][index]:.3f}" for name in METHODS for table in tables.values()),
                    f"{tables['equations'][SINGLE][index]:.3f}",
                )
                for index, (model, num_tokens) in enumerate(moe_paper.POINTS)
            ),
        ),
    )
