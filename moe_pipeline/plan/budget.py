"""Budget: the bytes a layer may take, and what every pair of chunk count and strategy takes of them."""

from collections.abc import Sequence
from dataclasses import dataclass

from moe_pipeline.config import PipelineConfig, Restore
from moe_pipeline.plan.ledger import LayerShape, ledger

CHUNK_COUNTS = (1, 2, 3, 4, 6, 8)
RESTORES: tuple[Restore, ...] = ("none", "S1", "S2", "S3", "S4")


class BudgetError(ValueError):
    """No pair of chunk count and strategy fits; the message says how many bytes are missing and what would fit.

    Source: not in the paper.
    """


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bytes a layer may take for activations and buffers; None is no limit.

    Source: not in the paper, which fits what the GPU has.
    """

    device_bytes: int | None = None
    host_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("device_bytes", "host_bytes"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 0):
                raise ValueError(f"{name}: got {value!r}; accepted is a number of bytes of at least 0, or None")


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a pair takes.

    Source: MPipeMoE (arXiv:2506.22175) equations 2-6, refined to what this runtime allocates.
    """

    num_chunks: int
    restore: Restore
    device_bytes: int
    """Activations and buffers at their peak."""
    host_bytes: int

    def missing(self, budget: Budget) -> str:
        """How many bytes are missing, in words; empty where it fits.

        Args:
            budget: What there is.

        Source: not in the paper.
        """
        places = (
            ("device", self.device_bytes, budget.device_bytes),
            ("host", self.host_bytes, budget.host_bytes),
        )
        return " and ".join(
            f"{needed - limit:,} bytes are missing on the {place}"
            for place, needed, limit in places
            if limit is not None and needed > limit
        )


def footprints(shape: LayerShape, chunk_counts: Sequence[int], restores: Sequence[Restore]) -> tuple[Footprint, ...]:
    """What every pair takes.

    Args:
        shape: The layer; rows are spread equally over experts.
        chunk_counts: The n.
        restores: The strategies.

    Returns:
        Strategy by strategy.

    Source: MPipeMoE (arXiv:2506.22175) equations 2-6 and Table II.
    """
    accounts = {
        (num_chunks, restore): ledger(shape, PipelineConfig(num_chunks=num_chunks, restore=restore))
        for restore in restores
        for num_chunks in chunk_counts
    }
    return tuple(
        Footprint(
            num_chunks=num_chunks,
            restore=restore,
            device_bytes=account.activation_bytes,
            host_bytes=account.host_bytes,
        )
        for (num_chunks, restore), account in accounts.items()
    )


def nothing_fits(refused: Sequence[tuple[Footprint, str]], budget: Budget) -> BudgetError:
    """The error for a budget in which no pair fits.

    Args:
        refused: Every pair, and why it may not be taken.
        budget: What there is.

    Returns:
        The error; it names the pair that takes least.

    Source: not in the paper.
    """
    least, reason = min(refused, key=lambda pair: (pair[0].device_bytes, pair[0].host_bytes))
    return BudgetError(
        f"device_budget_bytes: got {budget.device_bytes} with host_budget_bytes={budget.host_bytes}; none of "
        f"{len(refused)} pairs of num_chunks and restore may be taken. The one that takes least is "
        f"num_chunks={least.num_chunks} with restore={least.restore!r}: {reason}. It fits with device_budget_bytes="
        f"{least.device_bytes} and host_budget_bytes={least.host_bytes}; or pass fewer tokens at once"
    )
