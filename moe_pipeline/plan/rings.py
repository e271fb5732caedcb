"""Rings: how many buffers of which size chunks and layers share in one pass, and what of them all takes in memory.

Legend: M model width, H hidden width, G width of T_M (H, or 2H for gated experts).
"""

from dataclasses import dataclass

from moe_pipeline.plan.partition import Partition
from moe_pipeline.plan.strategy import RingDepths

ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class RingSize:
    """A ring's depth and the size of one of its buffers.

    Source: MPipeMoE (arXiv:2506.22175) section III-D and figure 6.
    """

    depth: int
    rows: int
    width: int
    element_bytes: int

    @property
    def buffer_bytes(self) -> int:
        """Bytes of one buffer, aligned; not in the paper."""
        return aligned(self.rows * self.width * self.element_bytes)

    @property
    def num_bytes(self) -> int:
        """Bytes of all its buffers; not in the paper."""
        return self.depth * self.buffer_bytes


@dataclass(frozen=True, kw_only=True)
class HiddenShape:
    """What T_M looks like.

    Source: MPipeMoE (arXiv:2506.22175) section II-B; other activations than ReLU are our definition.
    """

    d_hidden: int
    """H."""
    gated: bool
    in_place: bool
    """Whether T_M holds the activation's result (ReLU) rather than its input, which needs a buffer beside it."""

    @property
    def width(self) -> int:
        """G; not in the paper."""
        return 2 * self.d_hidden if self.gated else self.d_hidden


def row_rings(
    partition: Partition, depths: RingDepths, *, width: int, element_bytes: int, backward: bool, resends: bool = False
) -> dict[str, RingSize]:
    """Rings of rows that travel to the experts and back.

    Args:
        partition: Rows of every chunk.
        depths: Buffers per ring.
        width: M.
        element_bytes: Bytes of an element.
        backward: Whether T_DI comes back too.
        resends: Whether it is sent again.

    Returns:
        Name -> size.

    Source: MPipeMoE (arXiv:2506.22175) section III-D and figure 6.
    """
    sent, received = partition.max_sent_rows, partition.max_received_rows
    exchanges = len(partition.sent[0]) > 1
    sorts = exchanges and partition.num_experts > 1
    rows = {"arrived": (depths.dispatched, received)}
    if exchanges:
        rows |= {"staging": (depths.staging, sent), "result": (depths.result, received)}
    if sorts:
        rows |= {"sorted": (depths.dispatched, received), "unsorted": (1, received)}
    if backward:
        rows["input"] = (depths.dispatched, received)
        if resends and exchanges:
            rows["input_staging"] = (depths.staging, sent)
        if sorts and resends:
            rows["input_sorted"] = (depths.dispatched, received)
    return {name: RingSize(depth, count, width, element_bytes) for name, (depth, count) in rows.items()}


def hidden_rings(
    rows: int, depths: RingDepths, shape: HiddenShape, *, element_bytes: int, backward: bool
) -> dict[str, RingSize]:
    """Rings for T_M and what is computed beside it.

    Args:
        rows: Rows of the largest chunk.
        depths: Buffers per ring.
        shape: What T_M looks like.
        element_bytes: Bytes of an element.
        backward: Whether gradients are computed.

    Returns:
        Name -> size.

    Source: MPipeMoE (arXiv:2506.22175) section III-D and figure 6; buffers beside T_M are our definition.
    """
    widths = {"hidden": (depths.hidden, shape.width)}
    if not shape.in_place:
        widths["activated"] = (1, shape.d_hidden)
    if backward:
        widths["grad_hidden"] = (1, shape.width)
        if shape.gated:
            widths["grad_activated"] = (1, shape.d_hidden)
    return {name: RingSize(depth, rows, width, element_bytes) for name, (depth, width) in widths.items()}


def total_bytes(rings: dict[str, RingSize]) -> int:
    """Bytes of the block that holds all rings; not in the paper."""
    return sum(size.num_bytes for size in rings.values())


def aligned(num_bytes: int) -> int:
    """A number of bytes rounded up to a whole cache line; not in the paper."""
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
