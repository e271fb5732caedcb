"""Time a layer beside its peers: python -m scripts.bench experiment=<package>/<name>."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import moe_pipeline
from configs.schema import Config
from configs.typed import ConfigError
from moe_pipeline import reference
from scripts.testbed import launch, plots, threads
from scripts.testbed.precision import resolve
from scripts.testbed.report import Section
from scripts.testbed.rows import Row
from scripts.testbed.timing import Timing, compare


def bench(config: Config, run: launch.Run) -> launch.Outcome:
    """Time the experiment's subject, forward and backward, beside its peers.

    Args:
        config: The run's configuration.
        run: Where to write.

    Raises:
        ConfigError: Where the experiment names no subject.
    """
    if config.bench.subject == "none":
        raise ConfigError("bench.subject: got none, accepts moe_layer")
    torch.set_num_threads(threads.chosen(config))
    torch.manual_seed(config.seed)
    timings = compare(moe_layer(config), repeats=config.bench.repeats, warmup=config.bench.warmup)
    return launch.Outcome(
        rows=tuple(row for name, timing in timings.items() for row in _rows(name, timing)),
        summary={f"step_time_ratio_{name}": timing.ratio for name, timing in timings.items()},
        sections=(_section(config, timings),),
    )


def moe_layer(config: Config) -> dict[str, Callable[[], object]]:
    """The dense feed-forward layer, the MoE layer that replaces it, and the reference loop over experts."""
    model, device = config.model, config.cluster.device
    experts = moe_pipeline.FeedForwardExperts(
        config.moe.gate.num_experts, model.d_model, model.d_ff, activation=model.activation
    )
    moe = moe_pipeline.MoELayer(moe_pipeline.Gate(config.moe.gate, model.d_model), experts).to(device)
    activation = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}[model.activation]()
    dense = nn.Sequential(nn.Linear(model.d_model, model.d_ff), activation, nn.Linear(model.d_ff, model.d_model)).to(device)
    x_TM = torch.randn(config.bench.num_tokens, model.d_model, device=device)
    bf16 = resolve(config.trainer.precision, device) == "bf16"

    def step(forward: Callable[[Tensor], Tensor], module: nn.Module) -> Callable[[], None]:
        def run() -> None:
            module.zero_grad(set_to_none=True)
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                y_TM = forward(x_TM.detach().requires_grad_())
            y_TM.float().square().mean().backward()

        return run

    return {
        "dense": step(dense, dense),
        "moe": step(lambda x: moe(x)[0], moe),
        "reference": step(lambda x: reference.moe_layer(moe, x), moe),
    }


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
        note=f"{config.bench.num_tokens} tokens, {model.d_model} x {model.d_ff}, {gate.num_experts} experts, top {gate.top_k}, "
        f"{torch.get_num_threads()} threads; medians of {config.bench.repeats} alternated rounds. "
        f"The MoE layer does {gate.top_k} times the dense layer's products.",
        plots=(plots.bars(medians, title="Step time", x_label="", y_label="us"),),
    )


if __name__ == "__main__":
    launch.main("bench", bench)
