"""Grouped products: rows sorted by expert times that expert's matrix, written where the caller says.

Legend: E experts, R rows sorted by expert, P rows padded to whole slots, I inputs and O outputs of a linear map.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

SLOT_ROWS = 64


def grouped_mm(
    rows_RI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, counts: Sequence[int], *, out_RO: Tensor
) -> None:
    """Write rows times their expert's matrix, plus its bias.

    Args:
        rows_RI: Rows sorted by expert.
        weight_EOI: One matrix per expert, in the rows' dtype.
        bias_EO: One bias per expert, or None.
        counts: Rows per expert, summing to R.
        out_RO: Where the result goes; may not overlap the rows.

    Source: MPipeMoE (arXiv:2506.22175) section II-B, GEMM1 and GEMM2.
    """
    slots = _slots(rows_RI, counts)
    rows_PI, out_PO = _spread(rows_RI, counts, slots), _blank(out_RO, counts, slots)
    for e, (slot, rows, out) in enumerate(zip(slots, rows_PI.split(slots), out_PO.split(slots), strict=True)):
        if not slot:
            continue
        if bias_EO is None:
            torch.mm(rows, weight_EOI[e].t(), out=out)
        else:
            torch.addmm(bias_EO[e], rows, weight_EOI[e].t(), out=out)
    _gather(out_PO, counts, slots, out=out_RO)


def grouped_dgrad(grad_RO: Tensor, weight_EOI: Tensor, counts: Sequence[int], *, out_RI: Tensor) -> None:
    """Write the gradient of `grouped_mm`'s rows.

    Args:
        grad_RO: Gradient of its result.
        weight_EOI: Its matrices.
        counts: Its rows per expert.
        out_RI: Where the gradient goes; may not overlap `grad_RO`.

    Source: as `grouped_mm`.
    """
    slots = _slots(grad_RO, counts)
    grad_PO, out_PI = _spread(grad_RO, counts, slots), _blank(out_RI, counts, slots)
    for e, (slot, grad, out) in enumerate(zip(slots, grad_PO.split(slots), out_PI.split(slots), strict=True)):
        if slot:
            torch.mm(grad, weight_EOI[e], out=out)
    _gather(out_PI, counts, slots, out=out_RI)


def grouped_wgrad(
    grad_RO: Tensor,
    rows_RI: Tensor,
    counts: Sequence[int],
    *,
    weight_EOI: Tensor | None,
    bias_EO: Tensor | None,
    accumulate: bool,
) -> None:
    """Write, or add, the gradients of `grouped_mm`'s matrices and biases.

    Args:
        grad_RO: Gradient of its result.
        rows_RI: Its rows.
        counts: Its rows per expert.
        weight_EOI: Where the matrices' gradient goes, in the rows' dtype or float32; None where it is not needed.
        bias_EO: The same for the biases.
        accumulate: Whether to add to what stands there.

    Source: as `grouped_mm`.
    """
    slots = _slots(rows_RI, counts)
    grad_PO = _spread(grad_RO, counts, slots)
    rows_PI = rows_RI if weight_EOI is None else _spread(rows_RI, counts, slots)
    start = 0
    for e, slot in enumerate(slots):
        grad, rows = grad_PO[start : start + slot], rows_PI[start : start + slot]
        start += slot
        if weight_EOI is not None:
            _add_product(grad, rows, weight_EOI[e], accumulate=accumulate)
        if bias_EO is not None:
            total = grad.sum(0, dtype=bias_EO.dtype)
            bias_EO[e] = bias_EO[e] + total if accumulate else total


def _add_product(grad_RO: Tensor, rows_RI: Tensor, out_OI: Tensor, *, accumulate: bool) -> None:
    if not len(rows_RI):
        if not accumulate:
            out_OI.zero_()
    elif out_OI.dtype != rows_RI.dtype:  # several low-precision parts are summed in float32
        product = torch.mm(grad_RO.t(), rows_RI)
        out_OI.add_(product) if accumulate else out_OI.copy_(product)
    elif accumulate:
        out_OI.addmm_(grad_RO.t(), rows_RI)
    else:
        torch.mm(grad_RO.t(), rows_RI, out=out_OI)


def _slots(rows_RI: Tensor, counts: Sequence[int]) -> list[int]:
    """Rows reserved per expert: the CPU's bf16 library builds a kernel for every new shape, so few shapes are used."""
    if rows_RI.device.type != "cpu" or rows_RI.dtype != torch.bfloat16:
        return list(counts)
    return [-(-count // SLOT_ROWS) * SLOT_ROWS for count in counts]


def _spread(rows_RI: Tensor, counts: Sequence[int], slots: list[int]) -> Tensor:
    """Move each expert's rows to the front of its slot; what is left of a slot is zero."""
    if slots == list(counts):
        return rows_RI
    rows_PI = rows_RI.new_zeros(sum(slots), rows_RI.shape[1])
    for rows, slot, count in zip(rows_RI.split(list(counts)), rows_PI.split(slots), counts, strict=True):
        slot[:count] = rows
    return rows_PI


def _blank(out_RO: Tensor, counts: Sequence[int], slots: list[int]) -> Tensor:
    """Room for padded results: the caller's own where nothing is padded."""
    return out_RO if slots == list(counts) else out_RO.new_empty(sum(slots), out_RO.shape[1])


def _gather(out_PO: Tensor, counts: Sequence[int], slots: list[int], *, out: Tensor) -> None:
    """Undo `_spread` into `out`."""
    if slots == list(counts):
        return
    for to, slot, count in zip(out.split(list(counts)), out_PO.split(slots), counts, strict=True):
        to.copy_(slot[:count])
