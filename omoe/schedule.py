"""Which phase a step belongs to: accumulating or orthogonal."""

from typing import Literal

from omoe.config import OMoEConfig

Phase = Literal["accumulating", "orthogonal"]


def phase(step: int, config: OMoEConfig) -> Phase:
    """The phase of a step, counted from 0.

    Every `period`-th step from `first_orthogonal_step` on is orthogonal; all others are accumulating.

    Source: OMoE (arXiv:2310.09762) names the two phases; their lengths are our definition, section 4, item 5.
    """
    in_cycle = step % config.period == config.period - 1
    return "orthogonal" if in_cycle and step >= config.first_orthogonal_step else "accumulating"


def refreshes(step: int, config: OMoEConfig) -> bool:
    """Whether a step refreshes the projectors of space=input.

    Source: our definition, section 4, the last loop of the pseudo-code.
    """
    return config.refresh_in_orthogonal or phase(step, config) == "accumulating"
