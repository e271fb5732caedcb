"""Stages: what an expert computes, cut into the pieces that a schedule moves around.

Legend: L experts here, R rows of a chunk sorted by expert, M model width, H hidden width, G width of `up` (H, or 2H for
gated experts), which is also the width of T_M.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_pipeline.grouped import grouped_dgrad, grouped_mm, grouped_wgrad
from moe_pipeline.plan.rings import HiddenShape, RingSize, hidden_rings
from moe_pipeline.plan.strategy import RingDepths, Strategy
from moe_pipeline.run.buffers import HostCopies, Rings, Workspace

aten = torch.ops.aten


class ChunkExperts(Protocol):
    """The experts of one call, chunk by chunk; holds T_M between the stages.

    Source: MPipeMoE (arXiv:2506.22175) sections II-B and III-D.
    """

    def rings(self, rows: int, *, backward: bool) -> dict[str, RingSize]:
        """Rings of a pass for T_M and beside it, for chunks of at most so many rows."""

    def begin_forward(self, rings: Rings, chunk_rows: Sequence[int], *, keep: bool) -> None:
        """Take the rings and, where T_M is offloaded, room on the host."""

    def up(self, chunk: int, rows_RM: Tensor, counts: Sequence[int]) -> None:
        """GEMM1 and activation: T_DI to T_M."""

    def offload_hidden(self, chunk: int) -> None:
        """Copy T_M to the host."""

    def down(self, chunk: int, counts: Sequence[int], *, out_RM: Tensor) -> None:
        """GEMM2: T_M to T_DO."""

    def kept(self) -> list[Tensor]:
        """Device tensors that must live until backward."""

    def begin_backward(self, rings: Rings, kept: Sequence[Tensor], needs: Sequence[bool]) -> None:
        """Take the rings and what was kept; gradients, of the parameters that need one, start from nothing."""

    def fetch_hidden(self, chunk: int, counts: Sequence[int]) -> None:
        """Copy T_M back from the host."""

    def recompute(self, chunk: int, rows_RM: Tensor, counts: Sequence[int]) -> None:
        """T_DI to T_M once more."""

    def dgrad(
        self, chunk: int, grad_RM: Tensor, rows_RM: Tensor | None, counts: Sequence[int], *, out_RM: Tensor
    ) -> None:
        """The gradient of T_DO to that of T_DI."""

    def wgrad(self, chunk: int, grad_RM: Tensor, rows_RM: Tensor, counts: Sequence[int]) -> None:
        """Gradients of the parameters, added up over chunks."""

    def gradients(self) -> list[Tensor | None]:
        """The parameters' gradients, in the parameters' order, as tensors that nobody else holds."""


@dataclass(frozen=True)
class Pointwise:
    """An activation that writes where it is told, and its gradient.

    Source: MPipeMoE (arXiv:2506.22175) section II-B; the paper's in-place activation is exact for ReLU alone.
    """

    apply: Callable[[Tensor, Tensor], object]
    """(value, out): out may be value itself."""
    backward: Callable[[Tensor, Tensor, Tensor], object]
    """(gradient, kept, out): kept is the result if `from_result`, else the value; out may be the gradient."""
    from_result: bool = False
    """Whether the gradient needs the result alone, so that the value can be overwritten."""


def plain_function(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor] | None:
    """The function behind an activation, where it may be called again in backward and nobody wants to hear of it.

    Args:
        activation: A function, which is taken as it is, or a module of torch or of Hugging Face's library.

    Returns:
        The function; None for modules with hooks and for those this does not know.

    Source: not in the paper.
    """
    if not isinstance(activation, nn.Module):
        return activation
    kind = type(activation)
    if activation._forward_hooks or activation._forward_pre_hooks:
        return None
    if kind.__module__.split(".")[0] not in ("torch", "transformers"):
        return None
    if kind.__name__ in ("GELUActivation", "GELUTanh"):
        return activation.act  # type: ignore[return-value]
    if isinstance(activation, nn.GELU):
        return partial(functional.gelu, approximate=activation.approximate)
    known: dict[str, Callable[[Tensor], Tensor]] = {
        "ReLU": functional.relu,
        "SiLU": functional.silu,
        "SiLUActivation": functional.silu,
        "Tanh": torch.tanh,
        "Sigmoid": torch.sigmoid,
    }
    return known.get(kind.__name__)


def pointwise(activation: Callable[[Tensor], Tensor]) -> Pointwise:
    """The activation as operations that write in place; for an unknown function, by autograd.

    Args:
        activation: A function or a module.

    Returns:
        The two operations.

    Source: not in the paper.
    """
    activation = plain_function(activation) or activation
    if activation is functional.relu:
        return Pointwise(
            apply=lambda value, out: torch.clamp_min(value, 0, out=out),
            backward=lambda grad, kept, out: aten.threshold_backward.grad_input(grad, kept, 0, grad_input=out),
            from_result=True,
        )
    if activation is functional.silu:
        return Pointwise(
            apply=lambda value, out: aten.silu.out(value, out=out),
            backward=lambda grad, kept, out: aten.silu_backward.grad_input(grad, kept, grad_input=out),
        )
    approximate = _gelu_approximation(activation)
    if approximate is not None:
        return Pointwise(
            apply=lambda value, out: aten.gelu.out(value, approximate=approximate, out=out),
            backward=lambda grad, kept, out: aten.gelu_backward.grad_input(
                grad, kept, approximate=approximate, grad_input=out
            ),
        )
    return Pointwise(
        apply=lambda value, out: out.copy_(activation(value.clone())),
        backward=lambda grad, kept, out: out.copy_(_by_autograd(activation, kept, grad)),
    )


def _gelu_approximation(activation: Callable[[Tensor], Tensor]) -> str | None:
    if activation is functional.gelu:
        return "none"
    if getattr(activation, "func", None) is functional.gelu:  # functools.partial
        return str(getattr(activation, "keywords", {}).get("approximate", "none"))
    return None


def _by_autograd(activation: Callable[[Tensor], Tensor], value: Tensor, grad: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = value.detach().requires_grad_()
        (result,) = torch.autograd.grad(activation(leaf.clone()), leaf, grad)
    return result


class FeedForwardChunks:
    """down(activation(up(x))), with T_M kept, offloaded or recomputed.

    Args:
        weights: up (L, G, M), its bias (L, G) or None, down (L, M, H), its bias (L, M) or None, in the rows' dtype.
        activation: Between up and down.
        gated: Whether the activation of up's first half is multiplied with its second half.
        strategy: What happens to T_M.
        depths: Buffers per ring.
        num_chunks: n; low-precision gradients of several chunks are added up in float32.
        workspace: Where host memory is leased.

    Source: MPipeMoE (arXiv:2506.22175) sections II-B and III-D.
    """

    def __init__(
        self,
        weights: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
        activation: Pointwise,
        *,
        gated: bool,
        strategy: Strategy,
        depths: RingDepths,
        num_chunks: int,
        workspace: Workspace,
    ) -> None:
        self._up, self._up_bias, self._down, self._down_bias = weights
        self._activation, self._gated, self._strategy, self._depths = activation, gated, strategy, depths
        self._num_chunks, self._workspace = num_chunks, workspace
        self._in_place = activation.from_result and not gated
        self._shape = HiddenShape(d_hidden=weights[2].shape[2], gated=gated, in_place=self._in_place)
        self._hidden: dict[int, Tensor] = {}
        self._activated: dict[int, Tensor] = {}  # of a gated T_M the activation alone, before it is multiplied
        self._grad_hidden: dict[int, Tensor] = {}
        self._host: dict[int, Tensor] = {}
        self._host_copies: HostCopies | None = None
        self._gradients: list[Tensor | None] = []

    @property
    def _g(self) -> int:
        return self._up.shape[1]

    @property
    def _h(self) -> int:
        return self._down.shape[2]

    def rings(self, rows: int, *, backward: bool) -> dict[str, RingSize]:
        """T_M and what is computed beside it."""
        size = self._up.element_size()
        return hidden_rings(rows, self._depths, self._shape, element_bytes=size, backward=backward)

    def begin_forward(self, rings: Rings, chunk_rows: Sequence[int], *, keep: bool) -> None:
        """Take the rings and, where T_M is offloaded, room on the host."""
        self._rings, self._keep = rings, keep
        if keep and self._strategy.hidden == "offload":
            sizes = [RingSize(1, rows, self._g, self._up.element_size()).num_bytes for rows in chunk_rows]
            self._host_copies = HostCopies(sum(sizes), workspace=self._workspace, device=self._up.device)

    def up(self, chunk: int, rows_RM: Tensor, counts: Sequence[int]) -> None:
        """GEMM1 and activation: T_DI to T_M."""
        hidden_RG = self._rings.buffer("hidden", chunk, len(rows_RM), self._g, rows_RM.dtype)
        grouped_mm(rows_RM, self._up, self._up_bias, counts, out_RO=hidden_RG)
        self._hidden[chunk] = hidden_RG
        if self._in_place:
            self._activation.apply(hidden_RG, hidden_RG)

    def offload_hidden(self, chunk: int) -> None:
        """Copy T_M to the host."""
        if self._host_copies is not None:
            self._host[chunk] = self._host_copies.put(self._hidden[chunk])

    def down(self, chunk: int, counts: Sequence[int], *, out_RM: Tensor) -> None:
        """GEMM2: T_M to T_DO."""
        self._activate(chunk)
        grouped_mm(self._input_of_down(chunk), self._down, self._down_bias, counts, out_RO=out_RM)
        if not (self._keep and self._strategy.hidden == "keep"):
            del self._hidden[chunk]
            self._activated.pop(chunk, None)

    def kept(self) -> list[Tensor]:
        """T_M of every chunk and, where it is not its own activation, that, if they are kept."""
        kept = [kind[chunk] for kind in (self._hidden, self._activated) for chunk in sorted(kind)]
        self._hidden, self._activated = {}, {}
        return kept

    def begin_backward(self, rings: Rings, kept: Sequence[Tensor], needs: Sequence[bool]) -> None:
        """Take the rings and what was kept; gradients start from nothing."""
        if self._host_copies is not None:
            self._host_copies.check()
        self._rings = rings
        self._hidden = dict(enumerate(kept[: self._num_chunks]))
        self._activated = dict(enumerate(kept[self._num_chunks :]))
        dtype = self._up.dtype if self._num_chunks == 1 else torch.promote_types(self._up.dtype, torch.float32)
        needed = iter(needs)
        self._gradients = [
            torch.empty_like(weight, dtype=dtype) if weight is not None and next(needed) else None
            for weight in (self._up, self._up_bias, self._down, self._down_bias)
        ]

    def fetch_hidden(self, chunk: int, counts: Sequence[int]) -> None:
        """Copy T_M back from the host."""
        hidden_RG = self._rings.buffer("hidden", chunk, sum(counts), self._g, self._up.dtype)
        self._hidden[chunk] = hidden_RG.copy_(self._host[chunk], non_blocking=True)

    def recompute(self, chunk: int, rows_RM: Tensor, counts: Sequence[int]) -> None:
        """T_DI to T_M once more."""
        self.up(chunk, rows_RM, counts)

    def dgrad(
        self, chunk: int, grad_RM: Tensor, rows_RM: Tensor | None, counts: Sequence[int], *, out_RM: Tensor
    ) -> None:
        """The gradient of T_DO to that of T_DI."""
        hidden_RG = self._hidden[chunk]
        grad_RG = self._rings.buffer("grad_hidden", chunk, len(grad_RM), self._g, grad_RM.dtype)
        self._grad_hidden[chunk] = grad_RG
        if self._gated:
            self._ungate(chunk, grad_RM, counts, hidden_RG, grad_RG)
        else:
            grouped_dgrad(grad_RM, self._down, counts, out_RI=grad_RG)
            self._activation.backward(grad_RG, hidden_RG, grad_RG)
        grouped_dgrad(grad_RG, self._up, counts, out_RI=out_RM)

    def wgrad(self, chunk: int, grad_RM: Tensor, rows_RM: Tensor, counts: Sequence[int]) -> None:
        """Gradients of the parameters, added up over chunks."""
        up, up_bias, down, down_bias = self._gradients
        later = chunk > 0
        grad_RG = self._grad_hidden.pop(chunk)
        if down is not None or down_bias is not None:
            self._activate(chunk)
            activated_RH = self._input_of_down(chunk)
            grouped_wgrad(grad_RM, activated_RH, counts, weight_EOI=down, bias_EO=down_bias, accumulate=later)
        if up is not None or up_bias is not None:
            grouped_wgrad(grad_RG, rows_RM, counts, weight_EOI=up, bias_EO=up_bias, accumulate=later)
        del self._hidden[chunk]
        self._activated.pop(chunk, None)

    def gradients(self) -> list[Tensor | None]:
        """Gradients of up, its bias, down and its bias, without the biases that do not exist."""
        weights = (self._up, self._up_bias, self._down, self._down_bias)
        gradients, self._gradients = self._gradients, []
        if self._host_copies is not None:
            self._host_copies.release()
        return [
            None if grad is None else grad.to(self._up.dtype)
            for grad, weight in zip(gradients, weights, strict=True)
            if weight is not None
        ]

    def _activate(self, chunk: int) -> None:
        """Apply the activation to T_M, unless that was done in place or is still there."""
        if self._in_place or chunk in self._activated:
            return
        hidden_RG = self._hidden[chunk]
        activated_RH = self._rings.buffer("activated", chunk, len(hidden_RG), self._h, hidden_RG.dtype)
        self._activation.apply(hidden_RG[:, : self._h], activated_RH)
        self._activated[chunk] = activated_RH

    def _input_of_down(self, chunk: int) -> Tensor:
        """What GEMM2 reads; of a gated T_M in the activation's place, unless backward wants that once more."""
        hidden_RG = self._hidden[chunk]
        if self._in_place:
            return hidden_RG
        activated_RH = self._activated[chunk]
        if not self._gated:
            return activated_RH
        linear_RH = hidden_RG[:, self._h :]
        if self._keep and self._strategy.hidden == "keep":
            product_RH = self._rings.buffer("product", chunk, len(hidden_RG), self._h, hidden_RG.dtype)
            return torch.mul(activated_RH, linear_RH, out=product_RH)
        del self._activated[chunk]
        return activated_RH.mul_(linear_RH)

    def _ungate(self, chunk: int, grad_RM: Tensor, counts: Sequence[int], hidden_RG: Tensor, grad_RG: Tensor) -> None:
        """Gradients of both halves of a gated T_M."""
        gate_RH, linear_RH = hidden_RG[:, : self._h], hidden_RG[:, self._h :]
        grad_gate_RH, grad_linear_RH = grad_RG[:, : self._h], grad_RG[:, self._h :]
        self._activate(chunk)
        activated_RH = self._activated[chunk]
        grad_RH = self._rings.buffer("grad_activated", chunk, len(grad_RM), self._h, grad_RM.dtype)
        grouped_dgrad(grad_RM, self._down, counts, out_RI=grad_RH)
        torch.mul(grad_RH, linear_RH, out=grad_gate_RH)
        kept_RH = activated_RH if self._activation.from_result else gate_RH
        self._activation.backward(grad_gate_RH, kept_RH, grad_gate_RH)
        torch.mul(grad_RH, activated_RH, out=grad_linear_RH)
