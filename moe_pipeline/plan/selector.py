"""Selector: the fastest pair of chunk count and strategy whose memory fits, as predicted on a device."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from moe_pipeline.config import PipelineConfig, Restore
from moe_pipeline.plan.budget import CHUNK_COUNTS, RESTORES, Budget, Footprint, footprints, nothing_fits
from moe_pipeline.plan.call import plan_call
from moe_pipeline.plan.device import Device
from moe_pipeline.plan.ledger import LayerShape, balanced_partition
from moe_pipeline.plan.performance_model import equation_10_us, phases_us
from moe_pipeline.plan.simulator import step_us
from moe_pipeline.plan.strategy import strategy

logger = logging.getLogger(__name__)

TIE = 0.01  # predictions closer than this are equal: then less host memory, fewer copies, fewer chunks decide


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One pair, what it takes, and why it may not be taken.

    Source: MPipeMoE (arXiv:2506.22175) section III-E.
    """

    footprint: Footprint
    predicted_us: float
    """A step by the simulator."""
    equation_10_us: float
    phases_us: float
    unwise: str = ""
    """Why it makes no sense on the device; then it is taken only where nothing else fits."""
    missing: str = ""
    """The bytes that are missing, in words; empty where it fits."""

    @property
    def refused(self) -> str:
        """Why it is passed over; empty where it is not.

        Source: not in the paper.
        """
        return self.unwise or self.missing

    @property
    def num_chunks(self) -> int:
        """n; not in the paper."""
        return self.footprint.num_chunks

    @property
    def restore(self) -> Restore:
        """The strategy; not in the paper."""
        return self.footprint.restore

    def __str__(self) -> str:
        footprint, verdict = self.footprint, self.refused or "fits"
        return (
            f"n={self.num_chunks} {self.restore:4} {self.predicted_us:>10,.0f} us "
            f"{footprint.device_bytes:>14,} B {footprint.host_bytes:>14,} B host  {verdict}"
        )


def candidates(
    shape: LayerShape,
    device: Device,
    *,
    budget: Budget | None = None,
    chunk_counts: Sequence[int] = CHUNK_COUNTS,
    restores: Sequence[Restore] = RESTORES,
) -> tuple[Candidate, ...]:
    """Every pair, with its prediction and memory.

    Args:
        shape: The layer; rows are spread equally over experts.
        device: Speeds and interference.
        budget: What a layer may take; None takes what the device and its host have.
        chunk_counts: The n to consider.
        restores: The strategies to consider.

    Returns:
        The candidates, strategy by strategy.

    Source: MPipeMoE (arXiv:2506.22175) section III-E.
    """
    limits = budget or within(device)
    found = []
    for footprint in footprints(shape, chunk_counts, restores):
        num_chunks, restore = footprint.num_chunks, footprint.restore
        config = PipelineConfig(num_chunks=num_chunks, restore=restore)
        candidate = Candidate(
            footprint=footprint,
            predicted_us=step_us(plan_call("selector", config, balanced_partition(shape, config)), shape, device),
            equation_10_us=equation_10_us(shape, num_chunks, restore, device),
            phases_us=phases_us(shape, num_chunks, restore, device),
            unwise=_unwise(footprint, shape, device),
            missing=footprint.missing(limits),
        )
        found.append(candidate)
    return tuple(found)


def within(device: Device, device_bytes: int | None = None, host_bytes: int | None = None) -> Budget:
    """A budget whose open limits are what a device and its host have.

    Args:
        device: Any.
        device_bytes: Device memory a layer may take; None takes all.
        host_bytes: The same for host memory.

    Source: not in the paper.
    """
    return Budget(
        device_bytes=device.memory_bytes if device_bytes is None else device_bytes,
        host_bytes=device.host_bytes if host_bytes is None else host_bytes,
    )


def select(found: Sequence[Candidate], budget: Budget | None = None) -> Candidate:
    """The fastest candidate that fits and makes sense; where none that fits makes sense, the fastest that fits.

    Args:
        found: Of `candidates`.
        budget: The same as there, for the error.

    Returns:
        The choice; among equals the one with less host memory, then fewer copies, then fewer chunks.

    Raises:
        BudgetError: If none fits.

    Source: MPipeMoE (arXiv:2506.22175) section III-E; the order of equals is ours.
    """
    fitting = [one for one in found if not one.missing]
    if not fitting:
        raise nothing_fits([(one.footprint, one.missing) for one in found], budget or Budget())
    eligible = [one for one in fitting if not one.unwise] or fitting
    fastest = min(one.predicted_us for one in eligible)
    equal = [one for one in eligible if one.predicted_us <= fastest * (1 + TIE)]
    chosen = min(equal, key=lambda one: (one.footprint.host_bytes, _copies(one.footprint), one.num_chunks))
    faster = [one for one in found if one.predicted_us < fastest]
    for reason in dict.fromkeys(one.refused for one in faster):
        logger.info("n=%d %s is chosen; faster pairs were refused: %s", chosen.num_chunks, chosen.restore, reason)
    if chosen.unwise:
        logger.info("n=%d %s is chosen, the best that fits; but %s", chosen.num_chunks, chosen.restore, chosen.unwise)
    return chosen


def _unwise(footprint: Footprint, shape: LayerShape, device: Device) -> str:
    """Why a pair makes no sense on a device, whatever memory there is."""
    if footprint.num_chunks > 1 and shape.num_ranks > 1 and not device.interference.pays("compute", "comm"):
        return "messages and compute slow each other below one half: overlap does not pay"
    if _copies(footprint) and not device.pinned:
        return "there is no pinned host memory: copies would hold up compute"
    if _copies(footprint) and not device.interference.pays("compute", "copy"):
        return "copies and compute slow each other below one half: offloading does not pay"
    return ""


def _copies(footprint: Footprint) -> int:
    chosen = strategy(footprint.restore)
    return (chosen.dispatched == "offload") + (chosen.hidden == "offload")
