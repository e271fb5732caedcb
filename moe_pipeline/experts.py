"""Experts: rows sorted by expert -> rows of results, all experts of a process in one module.

Legend: E experts, R rows sorted by expert, M model width, H hidden width, I inputs and O outputs of a linear map.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from moe_pipeline.grouped import grouped_dgrad, grouped_mm, grouped_wgrad

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
                "the rows: pass rows sorted by expert, and how many each expert has"
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
        out_RO = rows_RI.new_empty(len(rows_RI), weight_EOI.shape[1])
        grouped_mm(rows_RI, weight_EOI, bias_EO, counts, out_RO=out_RO)
        ctx.save_for_backward(rows_RI, weight_EOI)
        ctx.counts = counts
        return out_RO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        rows_RI, weight_EOI = ctx.saved_tensors
        needs_rows, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_RI = torch.empty_like(rows_RI) if needs_rows else None
        grad_EOI = torch.empty_like(weight_EOI) if needs_weight else None
        grad_EO = weight_EOI.new_empty(weight_EOI.shape[:2]) if needs_bias else None
        if grad_RI is not None:
            grouped_dgrad(grad_RO, weight_EOI, ctx.counts, out_RI=grad_RI)
        grouped_wgrad(grad_RO, rows_RI, ctx.counts, weight_EOI=grad_EOI, bias_EO=grad_EO, accumulate=False)
        return grad_RI, grad_EOI, grad_EO, None


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
