"""space=update: the weights before the first step, W_0, in three bytes each where they are float32.

A row of a matrix is kept as integers of 24 bits, in steps of a power of two that the row's largest weight decides. What
is read back is the nearest multiple of the step, off by at most 2^-23 of that largest weight; a float of 24 bits, eight
of which are its exponent, would be off by up to 2^-17 of every weight. Changes are measured from what is read back, so
that all experts' have one start, exactly; rounding alone is no change. Weights of another dtype are kept as they are.

    start_high_EOI   the integers' upper 16 bits, int16
    start_low_EOI    their lower 8 bits, uint8
    start_step_EO1   the rows' steps, float32; nan for a row that is not finite, which is read back as nan
    start_EOI        instead of these three, for other dtypes

Shapes: E experts, or 1 where all began as copies; O output features, I input features.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

BITS = 24
LARGEST = 2 ** (BITS - 1) - 1
SLACK = 1 + 2**-20
"""For the rounding of sums of squares."""
LEAST_EXPONENT = -149
"""Of the smallest float32 above zero."""


def kept_start(weight_EOI: Tensor) -> dict[str, Tensor]:
    """What is kept of the weights before the first step.

    Source: our definition, section 13: one copy of W_0; its 24 bits are not in the paper.
    """
    if weight_EOI.dtype != torch.float32:
        return {"start_EOI": weight_EOI.clone()}
    largest_EO1 = weight_EOI.abs().amax(2, keepdim=True)
    exponent_EO1 = torch.frexp(largest_EO1.double()).exponent - (BITS - 1)  # of the step
    exponent_EO1 = torch.where(largest_EO1 > 0, exponent_EO1, LEAST_EXPONENT).clamp(min=LEAST_EXPONENT)
    step_EO1 = torch.where(largest_EO1.isfinite(), torch.exp2(exponent_EO1.double()).float(), torch.nan)
    rounded_EOI = (weight_EOI / step_EO1).round_().clamp_(-LARGEST, LARGEST).nan_to_num_(nan=0.0).int()
    return {
        "start_high_EOI": (rounded_EOI >> 8).to(torch.int16),
        "start_low_EOI": (rounded_EOI & 255).to(torch.uint8),
        "start_step_EO1": step_EO1,
    }


def start_EOI(state: Mapping[str, Tensor]) -> Tensor:  # noqa: N802 (shape letters)
    """The start that changes are measured from, in the dtype of the weights.

    Args:
        state: Holds what `kept_start` gave.

    Source: as `kept_start`.
    """
    if "start_EOI" in state:
        return state["start_EOI"]
    return state["start_low_EOI"].float().add_(state["start_high_EOI"], alpha=256).mul_(state["start_step_EO1"])


def rounding_E(state: Mapping[str, Tensor]) -> Tensor:  # noqa: N802 (shape letters)
    """Squared length that rounding the start may give to the change of an expert that has not moved.

    Args:
        state: Holds what `kept_start` gave.

    Returns:
        (E,) or (1,) float64: zero where the start is kept as it was.

    Source: as `kept_start`.
    """
    if "start_EOI" in state:
        start = state["start_EOI"]
        return torch.zeros(len(start), dtype=torch.float64, device=start.device)
    half_EO1 = state["start_step_EO1"].double() / 2
    return half_EO1.square().sum((1, 2)) * state["start_low_EOI"].shape[2] * SLACK


def changes(weight_EOI: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """Every expert's accumulated change W - W_0; zero for one that has moved no further than rounding may have.

    Args:
        weight_EOI: Weights now, of every expert here.
        state: Holds what `kept_start` gave.

    Source: our definition, section 13.
    """
    change_EOI = weight_EOI - start_EOI(state)
    square_E = torch.linalg.vector_norm(change_EOI, dim=(1, 2), dtype=torch.float64).square()
    still_E = square_E <= rounding_E(state)
    return change_EOI.masked_fill_(still_E[:, None, None], 0) if still_E.any() else change_EOI


def start_bytes(dtype: torch.dtype, d_out: int, d_in: int) -> int:
    """What `kept_start` takes for one matrix.

    Source: our definition, section 9.
    """
    if dtype != torch.float32:
        return d_out * d_in * dtype.itemsize
    return d_out * d_in * BITS // 8 + d_out * torch.float32.itemsize
