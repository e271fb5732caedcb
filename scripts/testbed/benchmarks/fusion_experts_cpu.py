"""One process: our layer with fused experts beside itself without them and Hugging Face's, forward and backward."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import Config
from fusion.run.executors import executors
from fusion.run.planned import planned_executor
from moe_pipeline import FeedForwardExperts
from scripts.testbed import launch, plots
from scripts.testbed.benchmarks.cpu_truth import ORDER_FACTOR
from scripts.testbed.benchmarks.own_layer import own_layer, sizes_of, step
from scripts.testbed.fused import FusedExperts
from scripts.testbed.instructions import instructions
from scripts.testbed.peer_processes.contest import WrongError
from scripts.testbed.peers import MoESizes, PeerLayer, hugging_face
from scripts.testbed.report import Section, Table
from scripts.testbed.rows import Row, headlines
from scripts.testbed.timing import Timing, compare

EXECUTOR = "experts_cpu"
OURS, UNFUSED = "moe_pipeline_fused", "moe_pipeline"
HUGGING_FACE = ("hf_eager", "hf_grouped_mm")
SMALLER = 8  # times as many experts, each so many times as narrow, and four times as many of them per token
Timings = dict[tuple[str, str, int], dict[str, Timing]]


def bench(config: Config, run: launch.Run) -> launch.Outcome:
    """Time all layers with every number of threads, few wide experts and many narrow ones.

    Args:
        config: The run's configuration.
        run: Where to write.

    Raises:
        WrongError: Where our layer computes something else than the library's.
    """
    bench = config.bench
    few = sizes_of(bench, gated=True, activation="silu")
    many = replace(
        few, num_experts=SMALLER * few.num_experts, d_hidden=max(8, few.d_hidden // SMALLER), top_k=4 * few.top_k
    )
    torch.manual_seed(config.seed)
    x_TM, grad_TM = torch.randn(2, bench.num_tokens, bench.d_model)
    executors.add(EXECUTOR, planned_executor(compiled=bench.cpu.compiled))
    threads_before = torch.get_num_threads()
    timings: Timings = {}
    try:
        for threads in bench.thread_counts:
            torch.set_num_threads(threads)
            for name, sizes in ((f"{few.num_experts}_experts", few), (f"{many.num_experts}_experts", many)):
                layers = _layers(sizes, config.seed)
                _check(layers, x_TM, grad_TM)
                for what, calls in _calls(layers, x_TM, grad_TM).items():
                    clock = time.process_time_ns if threads == 1 else time.perf_counter_ns
                    timings[name, what, threads] = compare(
                        calls, repeats=bench.repeats, warmup=bench.warmup, clock_ns=clock
                    )
    finally:
        torch.set_num_threads(threads_before)
    summary = _summary(timings)
    return launch.Outcome(
        rows=(*(row for case, found in timings.items() for row in _rows(case, found)), *headlines(OURS, summary)),
        summary=summary,
        sections=(_section(config, timings),),
        versions=instructions(),
    )


def _layers(sizes: MoESizes, seed: int) -> dict[str, nn.Module]:
    fused, plain = own_layer(sizes, seed=seed), own_layer(sizes, seed=seed)
    assert isinstance(fused.experts, FeedForwardExperts)
    fused.experts = FusedExperts(fused.experts, "silu", EXECUTOR)
    library: dict[str, nn.Module] = {
        f"hf_{name}": hugging_face(sizes, implementation=name, seed=seed) for name in ("eager", "grouped_mm")
    }
    return {OURS: fused, UNFUSED: plain, **library}


def _check(layers: Mapping[str, nn.Module], x_TM: Tensor, grad_TM: Tensor) -> None:
    """Outputs and gradients of our layer are those of the library's, as far as its own rounding says."""
    peer = layers[HUGGING_FACE[0]]
    plain = _results(peer, x_TM, grad_TM)
    exact = _results(peer.double(), x_TM.double(), grad_TM.double())
    peer.float()
    for name, own in _results(layers[OURS], x_TM, grad_TM).items():
        error, allowed = _distance(own, exact[name]), ORDER_FACTOR * _distance(plain[name], exact[name])
        if not error <= allowed:
            raise WrongError(f"{OURS}: {name} is off by {error:.2e}, {allowed:.2e} are allowed")


def _results(layer: nn.Module, x_TM: Tensor, grad_TM: Tensor) -> dict[str, Any]:
    x_TM = x_TM.detach().requires_grad_()
    layer.zero_grad(set_to_none=True)
    result = layer(x_TM)
    y_TM = result[0] if isinstance(result, tuple) else result
    y_TM.backward(grad_TM)
    if isinstance(layer, PeerLayer):
        weights = {name: layer.parts()[name][0] for name in ("up_EHM", "down_EMH")}
    else:
        experts: Any = layer.experts
        weights = {"up_EHM": experts.up.weight, "down_EMH": experts.down.weight}
    return {"y_TM": y_TM.detach(), "x_TM": x_TM.grad, **{name: weight.grad for name, weight in weights.items()}}


def _distance(left: Tensor, right: Tensor) -> float:
    return (left.double() - right.double()).abs().max().item()


def _calls(
    layers: Mapping[str, nn.Module], x_TM: Tensor, grad_TM: Tensor
) -> dict[str, dict[str, Callable[[], object]]]:
    def forward(layer: nn.Module) -> Callable[[], object]:
        @torch.no_grad()
        def run() -> None:
            layer(x_TM)

        return run

    def train(layer: nn.Module) -> Callable[[], object]:
        return lambda: step(layer, x_TM, grad_TM)

    return {
        "forward": {name: forward(layer) for name, layer in layers.items()},
        "train": {name: train(layer) for name, layer in layers.items()},
    }


def _summary(timings: Timings) -> dict[str, float | int | str | None]:
    """Each headline is the worst over experts and numbers of threads, against the better of the library's two."""
    summary: dict[str, float | int | str | None] = {}
    for what in ("forward", "train"):
        own = {case: found for case, found in timings.items() if case[1] == what}
        against = {case: min(found[name].ratio for name in HUGGING_FACE) for case, found in own.items()}
        summary[f"moe_speedup_hf_{what}"] = min(against.values())
        summary[f"moe_speedup_unfused_{what}"] = min(found[UNFUSED].ratio for found in own.values())
        for (experts, _, threads), ratio in against.items():
            summary[f"moe_speedup_hf_{what}_{experts}_{threads}t"] = ratio
    return summary


def _rows(case: tuple[str, str, int], found: Mapping[str, Timing]) -> list[Row]:
    experts, what, threads = case
    suffix = f"{what}_{experts}_{threads}t"
    rows = []
    for name, timing in found.items():
        rows += [
            Row(
                provider=name, metric=f"time_{suffix}", unit="us", value=timing.median_us, low=timing.low_us,
                high=timing.high_us,
            ),
            Row(provider=name, metric=f"time_ratio_{suffix}", unit="x ours", value=timing.ratio),
        ]  # fmt: skip
    return rows


def _section(config: Config, timings: Timings) -> Section:
    bench = config.bench
    table = tuple(
        (f"{experts}, {what}, {threads} thread(s)", name, f"{timing.median_us / 1e3:.1f} ms", f"{timing.ratio:.2f} x")
        for (experts, what, threads), found in timings.items()
        for name, timing in found.items()
    )
    medians = {
        name: [found[name].median_us / 1e3 for found in timings.values()] for name in next(iter(timings.values()))
    }
    return Section(
        title="Experts",
        note=f"{bench.num_tokens} tokens x {bench.d_model}, gated experts, fp32: {bench.num_experts} of width "
        f"{bench.d_hidden} with top {bench.top_k}, and {SMALLER} times as many, {SMALLER} times as narrow, with top "
        f"{4 * bench.top_k}. Medians of {bench.repeats} alternated rounds: CPU time with one thread, else wall time.",
        plots=(plots.bars(medians, title="Time of a call", x_label="case, in the table's order", y_label="ms"),),
        table=Table(headers=("Case", "Provider", "Time", "Against ours"), rows=table),
    )
