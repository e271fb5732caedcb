"""One process, no ranks: our layer beside Hugging Face's experts and DeepSpeed's layer, forward and backward.

The matrix products of the layer are timed alone, too, with the same library: no layer that uses it can be faster.
"""

from collections.abc import Callable

import torch
from torch import nn

from configs.schema import Config
from scripts.testbed import launch, plots
from scripts.testbed.benchmarks.own_layer import own_layer, sizes_of, step
from scripts.testbed.peers import MoESizes, deepspeed_layer, hugging_face
from scripts.testbed.report import Section, Table
from scripts.testbed.rows import Row
from scripts.testbed.timing import Timing, compare

OURS = "moe_pipeline"
HUGGING_FACE = ("hf_eager", "hf_grouped_mm")
PRODUCTS = "products_alone"


def bench(config: Config, run: launch.Run) -> launch.Outcome:
    """Time all layers with every number of threads.

    Args:
        config: The run's configuration.
        run: Where to write.
    """
    bench = config.bench
    sizes = sizes_of(bench, gated=True, activation="silu")
    layers: dict[str, nn.Module] = {
        OURS: own_layer(sizes, seed=config.seed),
        "hf_eager": hugging_face(sizes, implementation="eager", seed=config.seed),
        "hf_grouped_mm": hugging_face(sizes, implementation="grouped_mm", seed=config.seed),
        "deepspeed": deepspeed_layer(sizes, ep_size=1, seed=config.seed),
    }
    torch.manual_seed(config.seed)
    threads_before = torch.get_num_threads()
    timings: dict[tuple[str, int], dict[str, Timing]] = {}
    try:
        for threads in bench.thread_counts:
            torch.set_num_threads(threads)
            for name, calls in _calls(layers, bench.num_tokens, sizes).items():
                timings[name, threads] = compare(calls, repeats=bench.repeats, warmup=bench.warmup)
    finally:
        torch.set_num_threads(threads_before)
    return launch.Outcome(
        rows=tuple(
            row for case, found in timings.items() for row in _rows(case, found, _flops(sizes, bench.num_tokens))
        ),
        summary=_summary(timings),
        sections=(_section(config, sizes, timings),),
    )


def _calls(
    layers: dict[str, nn.Module], num_tokens: int, sizes: MoESizes
) -> dict[str, dict[str, Callable[[], object]]]:
    x_TM, grad_TM = torch.randn(num_tokens, sizes.d_model), torch.randn(num_tokens, sizes.d_model)

    def forward(layer: nn.Module) -> Callable[[], object]:
        @torch.no_grad()
        def run() -> None:
            layer(x_TM)

        return run

    def both(layer: nn.Module) -> Callable[[], object]:
        return lambda: step(layer, x_TM, grad_TM)

    products = _products(num_tokens, sizes)
    return {
        "forward": {**{name: forward(layer) for name, layer in layers.items()}, PRODUCTS: products[0]},
        "forward_backward": {**{name: both(layer) for name, layer in layers.items()}, PRODUCTS: products[1]},
    }


def _products(num_tokens: int, sizes: MoESizes) -> tuple[Callable[[], object], Callable[[], object]]:
    """The layer's products, each expert's rows an equal share, written into memory that is there: forward, and all."""
    rows, width, hidden = num_tokens * sizes.top_k // sizes.num_experts, sizes.d_model, sizes.d_hidden
    x_RM, out_RM = torch.randn(2, sizes.num_experts, rows, width)
    hidden_RG, activated_RH = (torch.randn(sizes.num_experts, rows, columns) for columns in (2 * hidden, hidden))
    up_EGM, down_EMH = (torch.randn(sizes.num_experts, *shape) for shape in ((2 * hidden, width), (width, hidden)))
    rows_RG, rows_RH, rows_RM = (torch.empty(rows, columns) for columns in (2 * hidden, hidden, width))
    grad_up_GM, grad_down_MH = torch.empty(2 * hidden, width), torch.empty(width, hidden)

    def forward() -> None:
        for e in range(sizes.num_experts):
            torch.mm(x_RM[e], up_EGM[e].t(), out=rows_RG)
            torch.mm(activated_RH[e], down_EMH[e].t(), out=rows_RM)

    def both() -> None:
        forward()
        for e in range(sizes.num_experts):
            torch.mm(out_RM[e], down_EMH[e], out=rows_RH)
            torch.mm(hidden_RG[e], up_EGM[e], out=rows_RM)
            torch.mm(out_RM[e].t(), activated_RH[e], out=grad_down_MH)
            torch.mm(hidden_RG[e].t(), x_RM[e], out=grad_up_GM)

    return forward, both


def _flops(sizes: MoESizes, num_tokens: int) -> int:
    """Products of a forward: three matrices, each token top_k times."""
    return 2 * 3 * num_tokens * sizes.top_k * sizes.d_model * sizes.d_hidden


def _summary(timings: dict[tuple[str, int], dict[str, Timing]]) -> dict[str, float | int | str | None]:
    """Each headline is the worst over forward, forward and backward, and thread counts."""
    summary: dict[str, float | int | str | None] = {}
    for (name, threads), found in timings.items():
        summary[f"speedup_vs_hf_best_{name}_{threads}t"] = min(found[peer].ratio for peer in HUGGING_FACE)
        summary[f"speedup_vs_deepspeed_{name}_{threads}t"] = found["deepspeed"].ratio
        summary[f"speedup_bound_deepspeed_{name}_{threads}t"] = found["deepspeed"].ratio / found[PRODUCTS].ratio
    for headline in ("speedup_vs_hf_best", "speedup_vs_deepspeed", "speedup_bound_deepspeed"):
        summary[headline] = min(float(v or 0) for key, v in summary.items() if key.startswith(f"{headline}_"))
    return summary


def _rows(case: tuple[str, int], found: dict[str, Timing], forward_flops: int) -> list[Row]:
    name, threads = case
    flops = forward_flops * (1 if name == "forward" else 3)
    suffix = f"{name}_{threads}t"
    rows = []
    for provider, timing in found.items():
        rows += [
            Row(
                provider=provider, metric=f"time_{suffix}", unit="us", value=timing.median_us, low=timing.low_us,
                high=timing.high_us,
            ),
            Row(provider=provider, metric=f"rate_{suffix}", unit="GFLOP/s", value=flops / timing.median_us / 1e3),
            Row(provider=provider, metric=f"time_ratio_{suffix}", unit="x ours", value=timing.ratio),
        ]  # fmt: skip
    return rows


def _section(config: Config, sizes: MoESizes, timings: dict[tuple[str, int], dict[str, Timing]]) -> Section:
    rows = tuple(
        (
            f"{name.replace('_', ' and ')}, {threads} thread(s)",
            provider,
            f"{timing.median_us / 1e3:.1f} ms",
            f"{timing.ratio:.2f} x",
        )
        for (name, threads), found in timings.items()
        for provider, timing in found.items()
    )
    medians = {
        provider: [found[provider].median_us / 1e3 for found in timings.values()]
        for provider in next(iter(timings.values()))
    }
    return Section(
        title="One process",
        note=f"{config.bench.num_tokens} tokens x {sizes.d_model}, hidden {sizes.d_hidden}, {sizes.num_experts} gated "
        f"experts, top {sizes.top_k}, fp32; medians of {config.bench.repeats} alternated rounds. {PRODUCTS}: the same "
        "matrix products and nothing else, by the library that all use. Groups of bars: "
        + ", ".join(f"{index} = {name} with {threads} thread(s)" for index, (name, threads) in enumerate(timings)),
        plots=(plots.bars(medians, title="Time of a call", x_label="case", y_label="ms"),),
        table=Table(headers=("Case", "Provider", "Time", "Against ours"), rows=rows),
    )
