"""Strategy: how a chunk's input T_DI and hidden values T_M come back in backward, and how many buffers each needs."""

from dataclasses import dataclass
from typing import Literal

from moe_pipeline.config import Restore

Dispatched = Literal["keep", "offload", "resend"]
Hidden = Literal["keep", "offload", "recompute"]


@dataclass(frozen=True)
class Strategy:
    """What happens to T_DI and T_M between forward and backward.

    Source: MPipeMoE (arXiv:2506.22175) Table II.
    """

    name: Restore
    dispatched: Dispatched
    """T_DI: kept on the device, copied to the host, or sent again."""
    hidden: Hidden
    """T_M: kept on the device, copied to the host, or computed again from T_DI."""

    @property
    def shares_buffers(self) -> bool:
        """Whether chunks and layers share rings of buffers; not in the paper."""
        return self.name != "none"


@dataclass(frozen=True, kw_only=True)
class RingDepths:
    """Buffers of one chunk's size per ring.

    Source: MPipeMoE (arXiv:2506.22175) section III-D and figure 6: two for T_DI and T_DO (one travels while one is
    computed), one for T_M. A second T_M where it is copied from or to the host, so that the copy of one chunk does not
    hold up the next, and the two buffers that gather what is sent are our definition.
    """

    staging: int = 2
    """Rows gathered to be sent (a slice of T_I, or of the gradient of T_O)."""
    dispatched: int = 2
    """T_DI, or the gradient of T_DO."""
    hidden: int = 1
    """T_M."""
    result: int = 2
    """T_DO, or the gradient of T_DI."""


def strategy(name: Restore) -> Strategy:
    """The strategy of a name.

    Args:
        name: none, S1, S2, S3 or S4.

    Returns:
        What it does to T_DI and T_M.

    Raises:
        ValueError: For another name.

    Source: MPipeMoE (arXiv:2506.22175) Table II.
    """
    known: dict[str, tuple[Dispatched, Hidden]] = {
        "none": ("keep", "keep"),
        "S1": ("offload", "offload"),
        "S2": ("resend", "offload"),
        "S3": ("offload", "recompute"),
        "S4": ("resend", "recompute"),
    }
    if name not in known:
        raise ValueError(f"restore: got {name!r}; accepted is one of {', '.join(known)}")
    return Strategy(name, *known[name])


def ring_depths(chosen: Strategy, num_chunks: int) -> RingDepths:
    """How deep the rings of a strategy are: never deeper than there are chunks.

    Args:
        chosen: The strategy.
        num_chunks: n.

    Returns:
        The depths; without sharing they mean nothing, for each chunk then has buffers of its own.

    Source: as `RingDepths`.
    """
    two = min(2, num_chunks)
    return RingDepths(staging=two, dispatched=two, hidden=two if chosen.hidden == "offload" else 1, result=two)
