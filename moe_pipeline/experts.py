"""Experts: rows sorted by expert -> rows of results, all experts of a process in one module.

Legend: E experts, R rows sorted by expert, P rows padded to whole slots, M model width, H hidden width, I inputs and
O outputs of a linear map.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

SLOT_ROWS = 64

Activation = Literal["relu", "gelu", "gelu_tanh", "silu"]


class GroupedLinear(nn.Module):
    """One `nn.Linear` per expert, with the weights stacked in a single parameter.

    Args:
        num_experts: E.
        d_in: I.
        d_out: O.
        bias: Whether each expert adds a bias.

    Source: MPipeMoE (arXiv:2506.22175) section II-B, GEMM1 and GEMM2; the stacking is not in the paper.
    """

    def __init__(self, num_experts: int, d_in: int, d_out: int, *, bias: bool = True) -> None:
        super().__init__()
        self.num_experts, self.d_in, self.d_out = num_experts, d_in, d_out
        self.weight = nn.Parameter(torch.empty(num_experts, d_out, d_in))
        self.bias = nn.Parameter(torch.empty(num_experts, d_out)) if bias else None
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(d_in**-0.5), d_in**-0.5)  # what nn.Linear does

    def forward(self, rows_RI: Tensor, counts: tuple[int, ...]) -> Tensor:
        """Apply expert e's map to the counts[e] rows that are its own.

        Args:
            rows_RI: Rows sorted by expert; cast to the weight's dtype, or to autocast's where that is on.
            counts: Rows per expert, summing to R.

        Returns:
            rows_RO in the dtype it was computed in.

        Raises:
            ValueError: If the counts do not fit the rows or the experts.

        Source: as the class.
        """
        if len(counts) != self.num_experts or sum(counts) != len(rows_RI):
            raise ValueError(
                f"counts: got {counts} for {len(rows_RI)} rows; accepted are {self.num_experts} numbers that sum to "
                "the rows: pass Routing.counts with the rows that `dispatch` made from it"
            )
        device_type = rows_RI.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else self.weight.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return _GroupedLinear.apply(rows_RI.to(dtype), self.weight.to(dtype), bias, counts)

    def extra_repr(self) -> str:
        """The shapes, for printing; not in the paper."""
        return f"{self.num_experts} x ({self.d_in} -> {self.d_out}), bias={self.bias is not None}"


class _GroupedLinear(torch.autograd.Function):
    """Every expert writes its slice of one buffer; autograd's own split, cat and stack would copy them all again."""

    @staticmethod
    def forward(
        ctx: Any, rows_RI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, counts: tuple[int, ...]
    ) -> Tensor:
        slots = _slots(rows_RI, counts)
        rows_PI = _spread(rows_RI, counts, slots)
        out_PO = rows_PI.new_empty(len(rows_PI), weight_EOI.shape[1])
        for e, (rows, out) in enumerate(zip(rows_PI.split(slots), out_PO.split(slots), strict=True)):
            if bias_EO is None:
                torch.mm(rows, weight_EOI[e].t(), out=out)
            else:
                torch.addmm(bias_EO[e], rows, weight_EOI[e].t(), out=out)
        ctx.save_for_backward(rows_PI, weight_EOI)
        ctx.counts, ctx.slots = counts, slots
        return _gather(out_PO, counts, slots)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        rows_PI, weight_EOI = ctx.saved_tensors
        needs_rows, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_PO = _spread(grad_RO, ctx.counts, ctx.slots)
        grad_PI = torch.empty_like(rows_PI) if needs_rows else None
        grad_EOI = torch.empty_like(weight_EOI) if needs_weight else None
        grad_EO = weight_EOI.new_empty(weight_EOI.shape[:2]) if needs_bias else None
        start = 0
        for e, slot in enumerate(ctx.slots):
            mine = slice(start, start := start + slot)
            if grad_PI is not None:
                torch.mm(grad_PO[mine], weight_EOI[e], out=grad_PI[mine])
            if grad_EOI is not None:
                torch.mm(grad_PO[mine].t(), rows_PI[mine], out=grad_EOI[e])
            if grad_EO is not None:
                torch.sum(grad_PO[mine], 0, out=grad_EO[e])
        return None if grad_PI is None else _gather(grad_PI, ctx.counts, ctx.slots), grad_EOI, grad_EO, None


def _slots(rows_RI: Tensor, counts: tuple[int, ...]) -> list[int]:
    """Rows reserved per expert: the CPU's bf16 library builds a kernel for every new shape, so few shapes are used."""
    if rows_RI.device.type != "cpu" or rows_RI.dtype != torch.bfloat16:
        return list(counts)
    return [-(-count // SLOT_ROWS) * SLOT_ROWS for count in counts]


def _spread(rows_RI: Tensor, counts: tuple[int, ...], slots: list[int]) -> Tensor:
    """Move each expert's rows to the front of its slot; what is left of a slot is zero."""
    if slots == list(counts):
        return rows_RI
    rows_PI = rows_RI.new_zeros(sum(slots), rows_RI.shape[1])
    for rows, slot, count in zip(rows_RI.split(counts), rows_PI.split(slots), counts, strict=True):
        slot[:count] = rows
    return rows_PI


def _gather(rows_PI: Tensor, counts: tuple[int, ...], slots: list[int]) -> Tensor:
    """Undo `_spread`."""
    if slots == list(counts):
        return rows_PI
    return torch.cat([slot[:count] for slot, count in zip(rows_PI.split(slots), counts, strict=True)])


class FeedForwardExperts(nn.Module):
    """The Transformer's feed-forward layer, once per expert: down(dropout(activation(up(x)))).

    Args:
        num_experts: E.
        d_model: M.
        d_hidden: H.
        activation: A name, or any pointwise function or module.
        gated: Multiply the activation of the first half of `up` with its second half (GLU; `up` is then 2H wide).
        bias: Whether both maps add a bias.
        dropout: Probability of dropping a hidden value in training.

    Source: MPipeMoE (arXiv:2506.22175) section II-B; the gated form is Shazeer (arXiv:2002.05202) equation 6.
    """

    def __init__(
        self,
        num_experts: int,
        d_model: int,
        d_hidden: int,
        *,
        activation: Activation | Callable[[Tensor], Tensor] = "relu",
        gated: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_experts, self.gated = num_experts, gated
        self.up = GroupedLinear(num_experts, d_model, 2 * d_hidden if gated else d_hidden, bias=bias)
        self.activation = activation if callable(activation) else _activation(activation)
        self.dropout = nn.Dropout(dropout)
        self.down = GroupedLinear(num_experts, d_hidden, d_model, bias=bias)

    def forward(self, rows_RM: Tensor, counts: tuple[int, ...]) -> Tensor:
        """Compute every row by the expert that owns it.

        Args:
            rows_RM: Rows sorted by expert.
            counts: Rows per expert, summing to R.

        Returns:
            rows_RM of results.

        Source: as the class.
        """
        hidden_RH = self.up(rows_RM, counts)
        if self.gated:
            gate_RH, linear_RH = hidden_RH.chunk(2, dim=-1)
            hidden_RH = self.activation(gate_RH) * linear_RH
        else:
            hidden_RH = self.activation(hidden_RH)
        return self.down(self.dropout(hidden_RH), counts)


class ModuleExperts(nn.Module):
    """Any modules as experts, each mapping (rows, M) to (rows, M).

    Args:
        experts: One module per expert; each is called even without rows, so that every rank has every gradient.

    Source: this generality is not in the paper.
    """

    def __init__(self, experts: Sequence[nn.Module]) -> None:
        super().__init__()
        if not experts:
            raise ValueError("experts: got an empty sequence; accepted is at least one module: pass one per expert")
        self.num_experts = len(experts)
        self.experts = nn.ModuleList(experts)

    def forward(self, rows_RM: Tensor, counts: tuple[int, ...]) -> Tensor:
        """Compute every row by the expert that owns it.

        Args:
            rows_RM: Rows sorted by expert.
            counts: Rows per expert, summing to R.

        Returns:
            rows_RM of results.

        Source: as the class.
        """
        return torch.cat([expert(rows) for expert, rows in zip(self.experts, rows_RM.split(counts), strict=True)])


def _activation(name: str) -> Callable[[Tensor], Tensor]:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": functional.relu,
        "gelu": functional.gelu,
        "gelu_tanh": partial(functional.gelu, approximate="tanh"),
        "silu": functional.silu,
    }
    if name not in functions:
        raise ValueError(f"activation: got {name!r}; accepted is one of {get_args(Activation)}, or a function")
    return functions[name]
