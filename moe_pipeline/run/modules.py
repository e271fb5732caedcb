"""Any modules as experts: what autograd keeps for them is kept, copied to the host, or computed again.

Legend: R rows of a chunk sorted by expert, M model width.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from moe_pipeline.plan.rings import RingSize
from moe_pipeline.plan.strategy import Strategy
from moe_pipeline.run.buffers import Rings


class ModuleChunks:
    """Experts that are called as a whole: forward(rows, counts).

    T_M is what autograd saves inside them. A saved tensor that is a view of T_DI is not saved but found again in T_DI
    when that is back. Random numbers (dropout) repeat when something is computed again.

    Args:
        experts: Called with the rows of a chunk and the rows per expert.
        parameters: Their parameters.
        strategy: What happens to T_M.
        device: Where the layer computes.

    Source: not in the paper, whose experts are two matrices; recomputation as in torch.utils.checkpoint.
    """

    def __init__(
        self,
        experts: nn.Module,
        parameters: Sequence[Tensor],
        *,
        strategy: Strategy,
        device: torch.device,
    ) -> None:
        aliases = {
            name: parameter.detach().requires_grad_(parameter.requires_grad)
            for (name, _), parameter in zip(experts.named_parameters(), parameters, strict=True)
        }
        self._experts = lambda rows_RM, counts: torch.func.functional_call(experts, aliases, (rows_RM, counts))
        self._parameters, self._strategy = tuple(aliases.values()), strategy
        self._results: dict[int, Tensor] = {}
        self._leaves: dict[int, Tensor] = {}
        self._random: dict[int, Tensor] = {}
        self._inputs: dict[int, Tensor] = {}
        self._gradients: list[Tensor | None] = []
        self._device_type = device.type
        self._over = False
        self._autocast: dict[str, Any] = {}

    def rings(self, rows: int, *, backward: bool) -> dict[str, RingSize]:
        """None: modules bring their own memory."""
        return {}

    def begin_forward(self, rings: Rings, chunk_rows: Sequence[int], *, keep: bool) -> None:
        """Remember whether there will be a backward, and how autocast stands."""
        self._keep = keep
        kind = self._device_type
        self._autocast = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}

    def up(self, chunk: int, rows_RM: Tensor, counts: Sequence[int]) -> None:
        """Call the modules; their results wait for `down`."""
        if not self._keep or self._strategy.hidden == "recompute":
            if self._keep:
                self._random[chunk] = _random_state(rows_RM.device)
            with torch.no_grad(), self._as_in_forward():
                self._results[chunk] = self._experts(rows_RM, counts)
            return
        self._call(chunk, rows_RM, counts)

    def offload_hidden(self, chunk: int) -> None:
        """Nothing: what autograd saved went to the host while the modules ran."""

    def down(self, chunk: int, counts: Sequence[int], *, out_RM: Tensor) -> None:
        """Hand over the results of `up`."""
        out_RM.copy_(self._results[chunk].detach())
        if not (self._keep and self._strategy.hidden != "recompute"):
            del self._results[chunk]

    def kept(self) -> list[Tensor]:
        """None: the modules' own graphs hold what they need."""
        return []

    def begin_backward(self, rings: Rings, kept: Sequence[Tensor], needs: Sequence[bool]) -> None:
        """Gradients start from nothing."""
        if self._strategy.hidden != "recompute" and self._over:
            raise RuntimeError(
                "backward: runs a second time through experts whose graphs were freed by the first; restore='S4' "
                "keeps no graph and can be run again"
            )
        self._over = True
        self._gradients = [None] * len(self._parameters)

    def fetch_hidden(self, chunk: int, counts: Sequence[int]) -> None:
        """Nothing: what lies on the host is fetched when autograd asks for it."""

    def recompute(self, chunk: int, rows_RM: Tensor, counts: Sequence[int]) -> None:
        """Call the modules again, with the random numbers of the first time."""
        with torch.random.fork_rng(_devices(rows_RM.device)):
            _set_random_state(self._random[chunk], rows_RM.device)
            self._call(chunk, rows_RM, counts)

    def dgrad(
        self, chunk: int, grad_RM: Tensor, rows_RM: Tensor | None, counts: Sequence[int], *, out_RM: Tensor
    ) -> None:
        """Gradients of the rows and of the parameters at once, by autograd."""
        assert rows_RM is not None, "a schedule with input_for_dgrad waits for T_DI"
        self._inputs[chunk] = rows_RM
        result_RM, leaf_RM = self._results.pop(chunk), self._leaves.pop(chunk)
        wanted = [leaf_RM, *(parameter for parameter in self._parameters if parameter.requires_grad)]
        found = torch.autograd.grad(result_RM, wanted, grad_RM.to(result_RM.dtype), allow_unused=True)
        out_RM.zero_() if found[0] is None else out_RM.copy_(found[0])
        of_parameters = iter(found[1:])
        for index, parameter in enumerate(self._parameters):
            new = next(of_parameters) if parameter.requires_grad else None
            old = self._gradients[index]
            self._gradients[index] = new if old is None else old if new is None else old + new

    def wgrad(self, chunk: int, grad_RM: Tensor, rows_RM: Tensor, counts: Sequence[int]) -> None:
        """Nothing: `dgrad` found them."""

    def gradients(self) -> list[Tensor | None]:
        """The parameters' gradients; zero where no row reached an expert, so that every rank has the same ones."""
        gradients, self._gradients, self._inputs = self._gradients, [], {}
        found: list[Tensor | None] = []
        for parameter, grad in zip(self._parameters, gradients, strict=True):
            nothing = torch.zeros_like(parameter) if parameter.requires_grad else None
            found.append(nothing if grad is None else grad.clone())  # autograd may have handed out one tensor twice
        return found

    def _call(self, chunk: int, rows_RM: Tensor, counts: Sequence[int]) -> None:
        leaf_RM = self._leaves[chunk] = rows_RM.data.requires_grad_()
        offloads = self._strategy.hidden == "offload"
        hooks = torch.autograd.graph.saved_tensors_hooks(*self._hooks(chunk, leaf_RM)) if offloads else nullcontext()
        with torch.enable_grad(), self._as_in_forward(), hooks:
            self._results[chunk] = self._experts(leaf_RM, counts)

    def _as_in_forward(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device_type, **self._autocast)

    def _hooks(self, chunk: int, leaf_RM: Tensor) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
        """Saved tensors go to the host, but for parameters (which stay) and views of T_DI (which come back with it)."""
        input_pointer = leaf_RM.untyped_storage().data_ptr()
        stay = {parameter.untyped_storage().data_ptr() for parameter in self._parameters}
        first = leaf_RM.storage_offset()

        def pack(tensor: Tensor) -> Any:
            pointer = tensor.untyped_storage().data_ptr()
            if pointer == input_pointer and tensor.dtype == leaf_RM.dtype:
                return tensor.shape, tensor.stride(), tensor.storage_offset() - first
            return tensor if pointer in stay else (tensor.device, tensor.to("cpu", copy=True))

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            if len(packed) == 2:
                device, host = packed
                return host.to(device)
            shape, stride, offset = packed
            back_RM = self._inputs[chunk]
            return back_RM.as_strided(shape, stride, back_RM.storage_offset() + offset)

        return pack, unpack


def _devices(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(state: Tensor, device: torch.device) -> None:
    torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)
