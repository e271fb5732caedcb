"""One MoE layer, forward and backward, beside the dense layer it replaces and one of as many products."""

from collections.abc import Callable

import torch
from torch import nn

import moe_pipeline
from configs.schema import Config
from scripts.testbed import launch, plots, threads
from scripts.testbed.precision import resolve
from scripts.testbed.report import Section
from scripts.testbed.rows import Row
from scripts.testbed.timing import Timing, compare


def bench(config: Config, run: launch.Run) -> launch.Outcome:
    """Time the three layers.

    Args:
        config: The run's configuration.
        run: Where to write.
    """
    torch.set_num_threads(threads.chosen(config))
    torch.manual_seed(config.seed)
    timings = compare(moe_layer(config), repeats=config.bench.repeats, warmup=config.bench.warmup)
    return launch.Outcome(
        rows=tuple(row for name, timing in timings.items() for row in _rows(name, timing)),
        summary={f"step_time_ratio_{name}": timing.ratio for name, timing in timings.items()},
        sections=(_section(config, timings),),
    )


def moe_layer(config: Config) -> dict[str, Callable[[], object]]:
    """The dense feed-forward layer, one with as many products as the MoE layer does, and the MoE layer."""
    model, gate, device = config.model, config.moe.gate, config.cluster.device
    experts = moe_pipeline.FeedForwardExperts(
        gate.num_experts, model.d_model, model.d_ff, activation=model.activation, gated=False, bias=True
    )
    layers = {
        "dense": _dense(config, model.d_ff),
        "dense_equal_flops": _dense(config, model.d_ff * gate.top_k),
        "moe": moe_pipeline.MoEFeedForward(moe_pipeline.MoELayer(moe_pipeline.Gate(gate, model.d_model), experts)),
    }
    x_TM = torch.randn(config.bench.num_tokens, model.d_model, device=device)
    bf16 = resolve(config.trainer.precision, device) == "bf16"

    def step(layer: nn.Module) -> Callable[[], None]:
        def run() -> None:
            layer.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                y_TM = layer(x_TM.detach().requires_grad_())
            y_TM.float().square().mean().backward()

        return run

    return {name: step(layer.to(device)) for name, layer in layers.items()}


def _dense(config: Config, d_ff: int) -> nn.Module:
    activation = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}[config.model.activation]()
    d_model = config.model.d_model
    return nn.Sequential(nn.Linear(d_model, d_ff), activation, nn.Linear(d_ff, d_model))


def _rows(name: str, timing: Timing) -> tuple[Row, Row]:
    return (
        Row(
            provider=name, metric="step_time", unit="us", value=timing.median_us, low=timing.low_us, high=timing.high_us
        ),
        Row(provider=name, metric="step_time_ratio", unit="x dense", value=timing.ratio),
    )


def _section(config: Config, timings: dict[str, Timing]) -> Section:
    gate, model = config.moe.gate, config.model
    medians = {name: [timing.median_us] for name, timing in timings.items()}
    return Section(
        title="Forward and backward of one layer",
        note=f"{config.bench.num_tokens} tokens, {model.d_model} x {model.d_ff}, {gate.num_experts} experts, "
        f"top {gate.top_k}, {torch.get_num_threads()} threads; medians of {config.bench.repeats} alternated rounds. "
        f"dense_equal_flops is a dense layer {gate.top_k} times as wide, which does as many products as the MoE layer.",
        plots=(plots.bars(medians, title="Step time", x_label="", y_label="us"),),
    )
