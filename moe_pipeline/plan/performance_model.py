"""Performance model: the papers' formulas for the time of a step, from a layer's sizes and a device's speeds.

Equation 10 takes the slowest stream of a pass; the journal follows a pass through its phases. Both ignore what the
simulator counts: gathers, sums, sorting, agreement, and the depth of rings.

Legend: n chunks, b rows of a chunk, M model width, H hidden width, g 2 for gated experts and 1 for others.
"""

from dataclasses import dataclass

from moe_pipeline.config import Restore
from moe_pipeline.plan.device import Device
from moe_pipeline.plan.ledger import LayerShape
from moe_pipeline.plan.schedule import Stream
from moe_pipeline.plan.strategy import Strategy, strategy


@dataclass(frozen=True)
class Workload:
    """Q of a pass: products, all-to-alls, and copies in units of one T_DI.

    Source: MPipeMoE (arXiv:2506.22175) Table II.
    """

    products: int
    """In units of b * H * M multiply-adds."""
    messages: int
    """In units of b * M elements."""
    copies: float
    """In units of b * M elements."""


def workload(chosen: Strategy, *, gated: bool, hidden_per_width: float, backward: bool) -> Workload:
    """What a strategy does in one pass of one chunk.

    Args:
        chosen: The strategy.
        gated: Whether T_M is twice as wide and its product twice as large.
        hidden_per_width: H / M.
        backward: Which pass.

    Returns:
        Q; for H = 4M and experts without gate that of the paper's table.

    Source: MPipeMoE (arXiv:2506.22175) Table II; gated experts and other H / M are our generalisation.
    """
    g = 2 if gated else 1
    copies = (chosen.dispatched == "offload") + (chosen.hidden == "offload") * g * hidden_per_width
    if not backward:
        return Workload(g + 1, 2, copies)
    return Workload(2 * (g + 1) + g * (chosen.hidden == "recompute"), 2 + (chosen.dispatched == "resend"), copies)


def equation_10_us(shape: LayerShape, num_chunks: int, restore: Restore, device: Device) -> float:
    """The step by equation 10 in its dimensional form: in each pass the slowest stream, n times.

    Args:
        shape: The layer; rows are spread equally.
        num_chunks: n.
        restore: The strategy.
        device: Speeds and interference.

    Returns:
        Microseconds of forward and backward.

    Source: MPipeMoE (arXiv:2506.22175) equations 7-10; eta stands where the print has a second mu.
    """
    chosen = strategy(restore)
    unit = _Unit(shape, num_chunks, device)
    busy = _streams(chosen, shape)
    total_us = 0.0
    for backward in (False, True):
        work = _workload(shape, chosen, backward=backward)
        total_us += num_chunks * max(
            work.products * unit.product_us,  # the paper takes compute's factor as 1
            work.messages * unit.message_us / device.interference.alpha("comm", busy),
            work.copies * unit.copy_us / device.interference.alpha("copy", busy),
        )
    return total_us


def phases_us(shape: LayerShape, num_chunks: int, restore: Restore, device: Device) -> float:
    """The step by the journal's phases: initial, saturating, saturated, melting, final.

    Args:
        shape: The layer; rows are spread equally.
        num_chunks: n.
        restore: The strategy.
        device: Speeds and interference.

    Returns:
        Microseconds of forward and backward.

    Source: MPMoE (IEEE TPDS 2024) section 4.2; all but the saturated phase of paradigm 1 are derived from MPipeMoE
    (arXiv:2506.22175) figure 7.
    """
    chosen = strategy(restore)
    unit = _Unit(shape, num_chunks, device)
    busy = _streams(chosen, shape)
    slow: dict[Stream, float] = {
        "compute": device.interference.alpha("compute", busy),
        "comm": device.interference.alpha("comm", busy),
        "copy": device.interference.alpha("copy", busy),
    }
    total_us = 0.0
    for backward in (False, True):
        work = _workload(shape, chosen, backward=backward)
        phases = _Phases(
            send_us=(work.messages - 1) * unit.message_us,
            receive_us=unit.message_us,
            compute_us=work.products * unit.product_us,
            copy_us=work.copies * unit.copy_us,
        )
        total_us += phases.total_us(num_chunks, slow, copies_first=backward)
    return total_us


def _workload(shape: LayerShape, chosen: Strategy, *, backward: bool) -> Workload:
    hidden = shape.hidden
    return workload(chosen, gated=hidden.gated, hidden_per_width=hidden.d_hidden / shape.d_model, backward=backward)


def _streams(chosen: Strategy, shape: LayerShape) -> frozenset[Stream]:
    """The streams a strategy keeps busy."""
    busy: set[Stream] = {"compute"}
    if shape.num_ranks > 1:
        busy.add("comm")
    if "offload" in (chosen.dispatched, chosen.hidden):
        busy.add("copy")
    return frozenset(busy)


class _Unit:
    """Times of one chunk's units of work."""

    def __init__(self, shape: LayerShape, num_chunks: int, device: Device) -> None:
        experts = shape.num_experts // shape.num_ranks
        rows = shape.tokens * shape.top_k / num_chunks
        row_bytes = shape.d_model * shape.element_bytes
        flops = 2 * rows / experts * shape.hidden.d_hidden * shape.d_model
        self.product_us = experts * device.product.time_us(flops)
        leaving = rows * row_bytes * (shape.num_ranks - 1) / shape.num_ranks
        self.message_us = device.message_us(leaving, shape.num_ranks)
        self.copy_us = device.copy.time_us(rows * row_bytes)


@dataclass(frozen=True, kw_only=True)
class _Phases:
    """Times of one chunk's stages, and the sum over a pass's phases."""

    send_us: float
    receive_us: float
    compute_us: float
    copy_us: float

    def total_us(self, num_chunks: int, slow: dict[Stream, float], *, copies_first: bool) -> float:
        send, receive, compute, copy = self.send_us, self.receive_us, self.compute_us, self.copy_us
        if num_chunks == 1:
            return send + compute + receive + copy
        saturated = max(compute / slow["compute"], (send + receive) / slow["comm"], copy / slow["copy"])
        saturating = max(compute / slow["compute"], send / slow["comm"], copy / slow["copy"] * copies_first)
        melting = max(compute / slow["compute"], receive / slow["comm"], copy / slow["copy"] * (not copies_first))
        initial = max(send, copy * copies_first)
        final = max(receive, copy * (not copies_first))
        return initial + saturating + (num_chunks - 2) * saturated + melting + final
