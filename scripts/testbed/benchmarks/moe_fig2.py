"""MPipeMoE figure 2: what states, activations and buffers take of a layer's memory, over the batch."""

from configs.schema import Config
from scripts.testbed import launch, plots
from scripts.testbed.benchmarks import moe_equations, moe_paper
from scripts.testbed.benchmarks.moe_paper_layer import SEQUENTIAL, account, paper_shape
from scripts.testbed.report import Section, Table
from scripts.testbed.rows import Row

BATCHES = tuple(2**power for power in range(8, 15))
PARTS = ("states", "activations", "buffers")
MIB = 2**20


def bench(config: Config, run: launch.Run) -> launch.Outcome:
    """Work out the breakdown of every model and batch.

    Args:
        config: The run's configuration.
        run: Where to write.
    """
    cases = {(model, num_tokens): breakdown(model, num_tokens) for model in moe_paper.MODELS for num_tokens in BATCHES}
    ledgers = {case: account(paper_shape(*case), SEQUENTIAL).activation_bytes / MIB for case in cases}
    rows = []
    for (model, num_tokens), parts in cases.items():
        rows += [
            Row(provider="equations", metric=f"{part}_{model}_{num_tokens}", unit="MiB", value=value)
            for part, value in parts.items()
        ]
        metric = f"activations_and_buffers_{model}_{num_tokens}"
        rows.append(Row(provider="ledger", metric=metric, unit="MiB", value=ledgers[model, num_tokens]))
    summary: dict[str, float | int | str | None] = {
        f"states_share_{model}_{num_tokens}": cases[model, num_tokens]["states"]
        / sum(cases[model, num_tokens].values())
        for model in moe_paper.MODELS
        for num_tokens in (BATCHES[0], BATCHES[-1])
    }
    return launch.Outcome(kind="simulated", rows=tuple(rows), summary=summary, sections=(_section(cases, ledgers),))


def breakdown(model: str, num_tokens: int) -> dict[str, float]:
    """MiB of states, activations and buffers of a sequential layer in fp32 (equations 1-3).

    Args:
        model: A name of Table III.
        num_tokens: B.
    """
    shape = paper_shape(model, num_tokens)
    width, hidden = shape.d_model, shape.hidden.d_hidden
    elements = (
        moe_equations.states(width, hidden, shape.num_experts),
        moe_equations.activations(num_tokens, width, hidden),
        moe_equations.sequential_buffers(num_tokens, width, hidden),
    )
    return {part: shape.element_bytes * count / MIB for part, count in zip(PARTS, elements, strict=True)}


def _section(cases: dict[tuple[str, int], dict[str, float]], ledgers: dict[tuple[str, int], float]) -> Section:
    return Section(
        title="Memory of a sequential layer",
        note="Formulas of the paper and our ledger, on 64 ranks with one expert each; nothing is timed. As the paper "
        "says, states dominate at small batches, activations and buffers at large ones. The ledger holds indices, "
        "weights and the layer's output besides, and gradients of rows beyond the two neighbouring ones.",
        plots=tuple(
            plots.bars(
                {part: [cases[model, num_tokens][part] for num_tokens in BATCHES] for part in PARTS},
                title=model,
                x_label="B = 256 doubled so many times",
                y_label="MiB",
            )
            for model in moe_paper.MODELS
        ),
        table=Table(
            headers=("Model", "B", *PARTS, "activations and buffers by ledger"),
            rows=tuple(
                (
                    *(model, str(num_tokens)),
                    *(f"{part:.1f}" for part in parts.values()),
                    f"{ledgers[model, num_tokens]:.1f}",
                )
                for (model, num_tokens), parts in cases.items()
            ),
        ),
    )
