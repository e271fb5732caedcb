"""MPipeMoE figure 12 on the papers' cluster: which number of chunks is fastest at which batch, and by how much."""

from configs.schema import Config
from moe_pipeline.plan.device import Device, load_device
from scripts.testbed import launch, plots
from scripts.testbed.benchmarks import moe_paper
from scripts.testbed.benchmarks.moe_fit import Speeds, figure_12, order_violations, simulated_speeds, speed_errors
from scripts.testbed.benchmarks.moe_paper_layer import CLUSTER
from scripts.testbed.report import Section, Table
from scripts.testbed.rows import Row, headlines

GRID = tuple(range(1 * moe_paper.K, 33 * moe_paper.K, moe_paper.K))
METHODS = ("n=2", "n=4", "n=8", "adaptive")


def bench(config: Config, run: launch.Run) -> launch.Outcome:
    """Simulate the figure's fifteen bars and the choice between them.

    Args:
        config: The run's configuration.
        run: Where to write.
    """
    device = load_device(CLUSTER)
    curve = {num_tokens: simulated_speeds(num_tokens, device) for num_tokens in GRID}
    found = figure_12(device)
    rows = []
    for num_tokens, printed in moe_paper.SPEED_OVER_ONE_CHUNK.items():
        metric = f"speed_over_one_chunk_{num_tokens}"
        ours = _named(found[num_tokens])
        paper = {f"n={num_chunks}": speed for num_chunks, speed in printed.items()}
        rows += [Row(provider=name, metric=metric, unit="x", value=ours[name]) for name in METHODS]
        rows += [
            Row(provider=f"{name}, paper", metric=metric, unit="x", value=speed, kind="paper")
            for name, speed in paper.items()
        ]
    chosen = {num_tokens: choice(speeds) for num_tokens, speeds in curve.items()}
    rows += [
        Row(provider="adaptive", metric=f"chunks_{num_tokens}", unit="chunks", value=float(num_chunks))
        for num_tokens, num_chunks in chosen.items()
    ]
    summary: dict[str, float | int | str | None] = {
        "max_error": max(map(abs, speed_errors(found).values())),
        "optimum_matches": sum(violation == 0 for violation in order_violations(found).values()),
        "optimum_cases": len(moe_paper.SPEED_OVER_ONE_CHUNK),
        "two_chunks_up_to_tokens": max((b for b, n in chosen.items() if n <= 2), default=None),
        "four_chunks_up_to_tokens": max((b for b, n in chosen.items() if n <= 4), default=None),
    }
    rows += headlines("moe_pipeline", summary)
    return launch.Outcome(
        kind="simulated", rows=tuple(rows), summary=summary, sections=(_section(device, found, curve),)
    )


def choice(speeds: Speeds) -> int:
    """The fastest number of chunks, the smaller of equals.

    Args:
        speeds: Chunks -> speed.
    """
    return min(speeds, key=lambda num_chunks: (-speeds[num_chunks], num_chunks))


def _named(speeds: Speeds) -> dict[str, float]:
    return {f"n={num_chunks}": speed for num_chunks, speed in speeds.items()} | {"adaptive": max(speeds.values())}


def _section(device: Device, found: dict[int, Speeds], curve: dict[int, Speeds]) -> Section:
    grid = [num_tokens / moe_paper.K for num_tokens in curve]
    lines = {f"n={n}": (grid, [speeds[n] for speeds in curve.values()]) for n in (2, 4, 8)}
    batches = [num_tokens / moe_paper.K for num_tokens in moe_paper.SPEED_OVER_ONE_CHUNK]
    printed = {
        f"n={n}, paper": (batches, [speeds[n] for speeds in moe_paper.SPEED_OVER_ONE_CHUNK.values()]) for n in (2, 4, 8)
    }
    chosen = {"fastest": (grid, [float(choice(speeds)) for speeds in curve.values()])}
    return Section(
        title="Speed over one chunk, and the choice",
        note="Simulated, MoE-GPT3-XL on 64 ranks with one expert each, forward and backward, nothing offloaded or "
        f"computed again. The device was fitted on this figure and no other. {device.origin} One chunk is our own "
        "schedule with n=1, in which the last message already hides behind weight gradients, so that the figure shows "
        "what splitting adds. The paper's bars do not grow evenly from 16k over 22k to 31k tokens, which no smooth "
        "model follows: the largest errors stand there and at 4k.",
        plots=(
            plots.curves(lines | printed, title="Speed over one chunk", x_label="B in 1,024 tokens", y_label="x"),
            plots.curves(chosen, title="Fastest number of chunks", x_label="B in 1,024 tokens", y_label="n"),
        ),
        table=Table(
            headers=("B", "n", "Ours", "Paper"),
            rows=tuple(
                (str(num_tokens), str(n), f"{found[num_tokens][n]:.3f}", f"{speed:.3f}")
                for num_tokens, printed_speeds in moe_paper.SPEED_OVER_ONE_CHUNK.items()
                for n, speed in printed_speeds.items()
            ),
        ),
    )
