"""The base optimizer's finished step, decoupled weight decay apart.

Shapes: E experts, O output features, I input features.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from omoe.experts import ExpertLinear

MARK = "decoupled_weight_decay"
"""How torch's Adam family says in a parameter group that decay is apart from the gradient."""
UNMARKED_DECOUPLED = (torch.optim.Adafactor, torch.optim.Muon)
UNMARKED_COUPLED = (
    torch.optim.ASGD,
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adamax,
    torch.optim.LBFGS,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.SGD,
    torch.optim.SparseAdam,
)


def decay_share(base: Optimizer, group: dict[str, Any]) -> float:
    """Share of a parameter that decoupled weight decay takes in a step: lr * weight_decay, or 0 where it is coupled.

    Args:
        base: The base optimizer. torch's own are known; any other says by the entry `decoupled_weight_decay` of its
            parameter groups which kind it has.
        group: One of its parameter groups.

    Raises:
        ValueError: The group decays weights and nothing says which way.

    Source: our definition, section 4: U has "decay apart", and decay is not projected.
    """
    weight_decay = float(group.get("weight_decay", 0.0))
    decoupled = group.get(MARK, isinstance(base, UNMARKED_DECOUPLED))
    if weight_decay and MARK not in group and not isinstance(base, UNMARKED_DECOUPLED + UNMARKED_COUPLED):
        raise ValueError(
            f"base: {type(base).__name__} has weight_decay={weight_decay} and does not say whether that is decoupled "
            f"from the gradient. Set {MARK!r} to True or False in each of its param_groups"
        )
    return float(group["lr"]) * weight_decay if decoupled and weight_decay else 0.0


def base_step_EOI(linear: ExpertLinear, before_EOI: Tensor, decay_shares: Sequence[float]) -> Tensor:  # noqa: N802
    """What the base optimizer has just added to every expert's weight, other than decoupled decay.

    Args:
        linear: Its weights after the step. A parameter whose gradient is None was not stepped.
        before_EOI: The weights before the step; overwritten where it is float32 or wider.
        decay_shares: `decay_share` of every parameter of the linear.

    Returns:
        (E, O, I) in float32 or wider: after - (1 - share) * before, zero for a parameter that was not stepped.

    Source: our definition, section 4, U of the pseudo-code.
    """
    step_EOI = before_EOI.to(torch.promote_types(before_EOI.dtype, torch.float32))
    parts = step_EOI.chunk(len(linear.parameters))
    for part_EOI, parameter, share in zip(parts, linear.parameters, decay_shares, strict=True):
        if parameter.grad is None:
            part_EOI.zero_()
        else:
            torch.sub(parameter.detach().view_as(part_EOI), part_EOI, alpha=1 - share, out=part_EOI)
    return step_EOI
