"""Which phase a step belongs to: accumulating or orthogonal."""

from dataclasses import dataclass
from typing import Literal, Protocol

Phase = Literal["accumulating", "orthogonal"]


class Schedule(Protocol):
    """Decides the phase of every step from its number alone, so that a resumed run goes on exactly.

    Source: OMoE (arXiv:2310.09762) names the two phases; that they are an object is ours.
    """

    def phase(self, step: int) -> Phase:
        """The phase of a step, counted from 0."""
        ...


@dataclass(frozen=True)
class Cycles:
    """Every `period`-th step from `first_orthogonal_step` on is orthogonal; all others are accumulating.

    Source: OMoE (arXiv:2310.09762) names the two phases; their lengths are our definition, section 4, item 5.
    """

    period: int
    """Steps in a cycle: period - 1 accumulating ones, then an orthogonal one."""
    first_orthogonal_step: int = 0
    """Steps before which every step is accumulating."""

    def phase(self, step: int) -> Phase:
        """The phase of a step, counted from 0.

        Source: our definition, section 4, item 5.
        """
        in_cycle = step % self.period == self.period - 1
        return "orthogonal" if in_cycle and step >= self.first_orthogonal_step else "accumulating"
