"""Work: what every operation of a call multiplies, moves, sends and copies, and how long that takes on a device.

Legend: T tokens, K rows per token, S rows of a chunk sent, R received, L experts here, M model width, H hidden width,
G width of T_M.
"""

from dataclasses import dataclass

from moe_pipeline.plan.call import CallPlan
from moe_pipeline.plan.device import Device
from moe_pipeline.plan.ledger import LayerShape
from moe_pipeline.plan.partition import Partition
from moe_pipeline.plan.schedule import Op


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one operation does.

    Source: MPipeMoE (arXiv:2506.22175) equations 7-9; what is moved beside products and messages is ours.
    """

    products: tuple[float, ...] = ()
    """FLOP of each matrix product."""
    rows_bytes: float = 0.0
    """Read and written by gathers, sums, activations and by adding to gradients."""
    message_bytes: float = 0.0
    """Leaving this rank, or coming to it if that is more."""
    copy_bytes: float = 0.0
    """To or from the host."""

    def time_us(self, device: Device, num_ranks: int) -> float:
        """Microseconds when nothing runs beside it.

        Args:
            device: Where.
            num_ranks: N.

        Source: MPipeMoE (arXiv:2506.22175) equations 7-9.
        """
        return (
            sum(device.product.time_us(flops) for flops in self.products)
            + device.rows.time_us(self.rows_bytes)
            + device.message_us(self.message_bytes, num_ranks)
            + device.copy.time_us(self.copy_bytes)
        )


@dataclass(frozen=True)
class _Rows:
    """Rows of one chunk on one rank."""

    sent: int
    received: int
    travelling: int
    """Leaving this rank, or coming to it if that is more."""
    of_experts: tuple[int, ...]


class CallWork:
    """The work of a call's operations.

    Args:
        plan: The call.
        shape: The layer.
        rank: This rank among those that share the experts.

    Source: MPipeMoE (arXiv:2506.22175) sections II-B and III-D.
    """

    def __init__(self, plan: CallPlan, shape: LayerShape, *, rank: int = 0) -> None:
        self._shape, self._sorts, self._keeps = shape, plan.sorts, plan.strategy.hidden == "keep"
        self._rows = [_rows(plan.partition, chunk, rank) for chunk in range(plan.partition.num_chunks)]
        self._row_bytes = shape.d_model * shape.element_bytes
        self._hidden_bytes = shape.hidden.width * shape.element_bytes
        self._activated_bytes = shape.hidden.d_hidden * shape.element_bytes

    def of(self, op: Op) -> Work:
        """The work of one operation.

        Args:
            op: Of the plan's forward or backward.

        Source: as `CallWork`.
        """
        rows = self._rows[op.chunk]
        match op.stage:
            case "gather" | "regather":
                return Work(rows_bytes=2 * rows.sent * self._row_bytes)
            case "gather_grad":  # read twice (with T_O) and written, then scaled by the rows' weights
                return Work(rows_bytes=7 * rows.sent * self._row_bytes)
            case "sum":
                return Work(rows_bytes=(5 * self._shape.top_k - 1) * self._shape.tokens * self._row_bytes)
            case "sum_grad":
                return Work(rows_bytes=(5 * self._shape.top_k - 3) * self._shape.tokens * self._row_bytes)
            case "dispatch" | "combine" | "dispatch_grad" | "resend" | "combine_grad":
                return Work(message_bytes=rows.travelling * self._row_bytes)
            case "offload_dispatched" | "fetch_dispatched":
                return Work(copy_bytes=rows.received * self._row_bytes)
            case "offload_hidden" | "fetch_hidden":
                return Work(copy_bytes=rows.received * self._hidden_bytes)
            case _:
                return self._computed(op, rows.received, rows.of_experts)

    def _computed(self, op: Op, rows: int, of_experts: tuple[int, ...]) -> Work:
        hidden, width = self._shape.hidden, self._shape.d_model
        first = tuple(2.0 * count * width * hidden.width for count in of_experts if count)
        second = tuple(2.0 * count * width * hidden.d_hidden for count in of_experts if count)
        sorted_bytes = 2 * rows * self._row_bytes if self._sorts else 0
        part_bytes = rows * self._activated_bytes  # of one half of a gated T_M, or of all of another
        match op.stage:
            case "up" | "recompute":
                return Work(products=first, rows_bytes=sorted_bytes + 2 * part_bytes * hidden.in_place)
            case "down":
                late_bytes = (2 + 3 * hidden.gated) * part_bytes * (not hidden.in_place)
                return Work(products=second, rows_bytes=late_bytes + sorted_bytes)
            case "dgrad":
                gate_bytes = (6 + 2 * (not self._keeps)) * part_bytes * hidden.gated
                return Work(products=second + first, rows_bytes=2 * sorted_bytes + 3 * part_bytes + gate_bytes)
            case "wgrad":
                again = 3 if hidden.gated else 2 * (not self._keeps and not hidden.in_place)
                gradients = self._shape.parameter_bytes * (2 if op.chunk else 1)
                return Work(products=second + first, rows_bytes=again * part_bytes + gradients)
        raise ValueError(f"op: got {op}; accepted is an operation of a plan's schedules")


def _rows(cut: Partition, chunk: int, rank: int) -> _Rows:
    sent, received = cut.sent_rows(chunk), cut.received_rows(chunk)
    travelling = max(sum(rows) - rows[rank] for rows in (sent, received))
    return _Rows(sum(sent), sum(received), travelling, cut.expert_rows(chunk))
