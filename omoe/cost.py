"""What OMoE takes beside the base optimizer, known before it starts: memory, arithmetic and traffic.

Shapes: E experts of this rank, O output features, I input features, W columns of a projector of low rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from omoe.config import OMoEConfig
from omoe.experts import ExpertLinear, select_linears
from omoe.low_rank import num_columns
from omoe.start import start_bytes

FLOAT_BYTES = torch.float32.itemsize


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Sums over the projected linears of one process.

    Source: our definition, section 9 (overhead, our arithmetic).
    """

    state_bytes: int
    """Kept between steps and in checkpoints."""
    scratch_bytes: int
    """Kept between steps, not in checkpoints: the weights before an orthogonal step."""
    flops_per_step: float
    """Multiplications and additions, averaged over a cycle."""
    moved_bytes_per_step: float
    """Memory that is read or written, averaged over a cycle."""

    def seconds_per_step(self, *, flops_per_s: float, bytes_per_s: float) -> float:
        """Time on a device whose arithmetic and memory traffic do not overlap.

        Source: not in the paper.
        """
        return self.flops_per_step / flops_per_s + self.moved_bytes_per_step / bytes_per_s

    def __str__(self) -> str:
        """In words, for a log; not in the paper."""
        return (
            f"state {self.state_bytes / 1e6:.1f} MB, scratch {self.scratch_bytes / 1e6:.1f} MB, "
            f"{self.flops_per_step / 1e9:.2f} GFLOP and {self.moved_bytes_per_step / 1e9:.2f} GB of traffic a step"
        )


def cost(expert_linears: Sequence[ExpertLinear], config: OMoEConfig, *, copies: bool = True) -> Cost:
    """What OMoE will take.

    Args:
        expert_linears: From `find_expert_linears`; parameters on the meta device do.
        config: Every choice of the method.
        copies: Whether all experts of a linear are equal at the start, as after upcycling; their start is then kept
            once.

    Source: our definition, section 9.
    """
    parts = [_linear(linear, config, copies=copies) for linear in select_linears(expert_linears, config.linears)]
    return Cost(
        state_bytes=sum(part.state_bytes for part in parts),
        scratch_bytes=sum(part.scratch_bytes for part in parts),
        flops_per_step=sum(part.flops_per_step for part in parts),
        moved_bytes_per_step=sum(part.moved_bytes_per_step for part in parts),
    )


def _linear(linear: ExpertLinear, config: OMoEConfig, *, copies: bool) -> Cost:
    num_experts, d_out, d_in = linear.shape_EOI
    weight_bytes = num_experts * d_out * d_in * linear.parameters[0].dtype.itemsize
    step_values = num_experts * d_out * d_in
    copy_bytes = step_values * FLOAT_BYTES + weight_bytes  # read the weights, write the copy
    if config.space == "update":
        kept_bytes = start_bytes(linear.parameters[0].dtype, d_out, d_in) * (1 if copies else num_experts)
        decoded_bytes = weight_bytes // num_experts * (1 if copies else num_experts)
        # products: copy, start and weights are read, the change written; then change and weights read, weights written
        traffic = 3 * step_values * FLOAT_BYTES + 3 * weight_bytes + kept_bytes + 2 * decoded_bytes
        products = 2 * (2 * num_experts) ** 2 + 2 * num_experts**2
        return Cost(
            state_bytes=kept_bytes + 2 * num_experts * FLOAT_BYTES,
            scratch_bytes=step_values * FLOAT_BYTES,
            flops_per_step=(products * d_out * d_in) / config.period,
            moved_bytes_per_step=(copy_bytes + traffic) / config.period,
        )
    width = d_in if config.side == "input" else d_out
    columns = width if config.rank is None else num_columns(config.rank)
    state_bytes = num_experts * width * columns * FLOAT_BYTES
    applied = 2 * step_values * width if config.rank is None else 4 * step_values * num_experts * columns
    if config.combine == "product" and config.rank is None:
        applied *= num_experts
    refresh_bytes = 2 * state_bytes if config.rank is None else num_experts * width * FLOAT_BYTES
    refresh_flops = 4 * num_experts * width * columns if config.rank is None else 0
    if config.source != "inputs":  # all of it is read for its mean row
        refresh_bytes += weight_bytes
        refresh_flops += step_values
    traffic = state_bytes + 3 * step_values * FLOAT_BYTES + 3 * weight_bytes
    return Cost(
        state_bytes=state_bytes + num_experts * (2 * FLOAT_BYTES + torch.int64.itemsize),
        scratch_bytes=step_values * FLOAT_BYTES,
        flops_per_step=applied / config.period + refresh_flops,
        moved_bytes_per_step=(copy_bytes + traffic) / config.period + refresh_bytes,
    )
