"""The papers' layers on paper: their shapes, and how long a step of one takes on a device."""

import functools
from dataclasses import replace
from typing import TypeVar

from moe_pipeline import PipelineConfig
from moe_pipeline.config import Restore
from moe_pipeline.plan.call import CallPlan, plan_call
from moe_pipeline.plan.device import Device, Speed
from moe_pipeline.plan.ledger import LayerShape, Ledger, balanced_partition, ledger
from moe_pipeline.plan.rings import HiddenShape
from moe_pipeline.plan.schedule import Stream
from moe_pipeline.plan.simulator import simulate, step_us
from scripts.testbed.benchmarks.moe_memory import HIDDEN_PER_WIDTH, PAPER_WIDTHS
from scripts.testbed.benchmarks.moe_paper import NUM_EXPERTS, NUM_RANKS
from scripts.testbed.rows import Kind

Figures = TypeVar("Figures")

CLUSTER = "a100_hdr"
SEQUENTIAL = PipelineConfig(overlap=False)
"""FastMoE's schedule: one chunk, each operation after the one before it."""
FP32_FLOPS = {"a100_hdr": 19.5e12, "v100_ib56": 15.7e12}
"""Published rate of products without tensor cores."""


def paper_shape(
    model: str, num_tokens: int, *, num_ranks: int = NUM_RANKS, num_experts: int = NUM_EXPERTS
) -> LayerShape:
    """A layer of the papers: top 1, ReLU, fp32, H = 4M.

    Args:
        model: A name of Table III.
        num_tokens: B, of each rank.
        num_ranks: N.
        num_experts: E.
    """
    width = PAPER_WIDTHS[model]
    return LayerShape(
        tokens=num_tokens,
        top_k=1,
        d_model=width,
        hidden=HiddenShape(d_hidden=HIDDEN_PER_WIDTH * width, gated=False, in_place=True),
        num_experts=num_experts,
        num_ranks=num_ranks,
    )


def pipelined(num_chunks: int, restore: Restore = "none") -> PipelineConfig:
    """A pipeline of a number of chunks.

    Args:
        num_chunks: n.
        restore: What is kept for backward.
    """
    return PipelineConfig(num_chunks=num_chunks, restore=restore)


def one_rank_at_a_time(num_ranks: int = NUM_RANKS) -> PipelineConfig:
    """FasterMoE's schedule as the paper describes it: a chunk is what goes to one rank.

    Args:
        num_ranks: N.
    """
    return PipelineConfig(num_chunks=num_ranks, split="ranks")


def without_tensor_cores(device: Device) -> Device:
    """The same device with products in fp32, at their published rate and with the same latency.

    Args:
        device: One of `FP32_FLOPS`.
    """
    return replace(device, product=Speed(device.product.latency_us, ((1.0, FP32_FLOPS[device.name]),)))


@functools.lru_cache(maxsize=1024)
def _plan(shape: LayerShape, config: PipelineConfig) -> CallPlan:
    return plan_call("paper", config, balanced_partition(shape, config))


def time_us(shape: LayerShape, config: PipelineConfig, device: Device) -> float:
    """Length of a simulated step.

    Args:
        shape: The layer.
        config: How it is pipelined.
        device: Where.
    """
    return step_us(_plan(shape, config), shape, device)


def busy_us(shape: LayerShape, config: PipelineConfig, device: Device) -> dict[Stream, float]:
    """How long the operations of every stream take in a simulated step, the ones of a stream added up.

    Args:
        shape: The layer.
        config: How it is pipelined.
        device: Where.
    """
    busy: dict[Stream, float] = {"compute": 0.0, "comm": 0.0, "copy": 0.0}
    for span in simulate(_plan(shape, config), shape, device).spans:
        busy[span.op.stream] += span.stop_us - span.start_us
    return busy


def sides(ours: Figures, paper: Figures) -> tuple[tuple[str, Kind | None, Figures], ...]:
    """Two tables of a figure, each after the end of its providers' names and the kind of its rows.

    Args:
        ours: What was simulated.
        paper: What is printed.
    """
    return ("", None, ours), (", paper", "paper", paper)


def account(shape: LayerShape, config: PipelineConfig) -> Ledger:
    """The ledger of a step.

    Args:
        shape: The layer.
        config: How it is pipelined.
    """
    return ledger(shape, config, _plan(shape, config).partition)


def best_chunks(
    shape: LayerShape, device: Device, *, restore: Restore = "none", among: tuple[int, ...] = (2, 4, 8)
) -> int:
    """The fastest number of chunks.

    Args:
        shape: The layer.
        device: Where.
        restore: The strategy.
        among: The numbers to try.
    """
    return min(among, key=lambda num_chunks: time_us(shape, pipelined(num_chunks, restore), device))
