"""Experts spread over ranks: every rank holds as many, in the order of the ranks, and sees the others' when needed.

Shapes: E experts of this rank, N experts of all ranks.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class ExpertGroup:
    """The ranks over which one copy of all experts is spread; all of its calls are made by every rank together.

    Source: not in the paper.
    """

    group: dist.ProcessGroup | None = None
    """None where every expert is here."""

    @property
    def size(self) -> int:
        """Ranks; not in the paper."""
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        """This rank among them; not in the paper."""
        return 0 if self.group is None else self.group.rank()

    def own(self, num_experts: int) -> slice:
        """Where this rank's experts stand among all, if it has so many.

        Source: not in the paper.
        """
        return slice(self.rank * num_experts, (self.rank + 1) * num_experts)

    def gather(self, value_E: Tensor) -> Tensor:
        """This rank's tensor, one row per expert, with the rows of all ranks.

        Source: not in the paper.
        """
        if self.group is None:
            return value_E
        value_E = value_E.contiguous()
        parts = [torch.empty_like(value_E) for _ in range(self.size)]
        dist.all_gather(parts, value_E, group=self.group)
        return torch.cat(parts)

    def total(self, value: Tensor) -> Tensor:
        """The sum over ranks of a tensor, which is overwritten where there are several.

        Source: not in the paper.
        """
        if self.group is not None:
            dist.all_reduce(value, group=self.group)
        return value
