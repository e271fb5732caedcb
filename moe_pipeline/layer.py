"""The MoE layer, and how to reach the MoE layers buried inside a model.

Legend: T tokens, M model width, E experts.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_pipeline.gate import Gate
from moe_pipeline.losses import RouterLosses
from moe_pipeline.routing import combine, dispatch, route


@dataclass(frozen=True, kw_only=True, eq=False)
class MoERecord:
    """What one call of an MoE layer did.

    Source: this record is not in the paper.
    """

    loss: Tensor
    """The router's losses times their weights: the scalar to add to the task's loss."""
    losses: RouterLosses
    """The same losses one by one, not weighted."""
    load_E: Tensor
    """int64, rows each expert computed."""
    dropped: float
    """Fraction of the chosen (token, expert) pairs that a capacity limit turned away."""


class MoELayer(nn.Module):
    """Gate, routing, experts: a feed-forward layer of which each token uses a few experts.

    Args:
        gate: Assigns tokens to experts.
        experts: `FeedForwardExperts`, `ModuleExperts`, or any module with `num_experts` and forward(rows, counts).

    Raises:
        ValueError: If gate and experts disagree about the number of experts.

    Source: MPipeMoE (arXiv:2506.22175) section II-A.
    """

    def __init__(self, gate: Gate, experts: nn.Module) -> None:
        super().__init__()
        num_experts = getattr(experts, "num_experts", None)
        if num_experts != gate.config.num_experts:
            raise ValueError(
                f"experts: got num_experts={num_experts}; accepted is the gate's num_experts="
                f"{gate.config.num_experts}: build both from one GateConfig"
            )
        self.gate = gate
        self.experts = experts

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, MoERecord]:
        """Apply the layer.

        Args:
            x: Tokens of shape (..., M), any floating dtype.
            mask: bool of shape (...), False for padding, which costs no compute and becomes 0.

        Returns:
            y of x's shape, in the dtype the experts computed in, and the record of this call.

        Raises:
            ValueError: If the mask's shape does not fit x.
            TypeError: If the mask is not bool.

        Source: MPipeMoE (arXiv:2506.22175) section II-A; the mask is not in the paper.
        """
        _check_mask(mask, x)
        x_TM = x.reshape(-1, x.shape[-1])
        assignment = self.gate(x_TM, mask_T=None if mask is None else mask.reshape(-1))
        routing = route(assignment, num_experts=self.gate.config.num_experts)
        rows_RM = self.experts(dispatch(x_TM, routing), routing.counts)
        y_TM = combine(rows_RM, routing, num_tokens=len(x_TM))
        record = MoERecord(
            loss=assignment.losses.total(self.gate.config),
            losses=assignment.losses,
            load_E=torch.tensor(routing.counts, device=x.device),
            dropped=1 - sum(routing.counts) / assignment.num_chosen if assignment.num_chosen else 0.0,
        )
        return y_TM.view(x.shape), record


class MoEFeedForward(nn.Module):
    """An MoE layer that returns y alone, for models that expect a tensor; `routed` brings its records.

    Args:
        moe: The layer.

    Source: this adapter is not in the paper.
    """

    def __init__(self, moe: MoELayer) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x of shape (..., M) and return y of the same shape.

        Source: as `MoELayer`.
        """
        y, _ = self.moe(x)
        return y


@contextmanager
def routed(model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> Iterator[dict[str, list[MoERecord]]]:
    """Collect what every MoE layer inside a model returns, and tell each layer which tokens are padding.

    Args:
        model: Any model that contains `MoELayer`s.
        masks: Name prefix -> bool mask of shape (...) for x of shape (..., M), False for padding. The longest prefix
            that matches a layer's name wins; "" matches every layer.

    Yields:
        Layer name -> one record per call, in the order of the calls. Only calls made inside the context are seen, so
        run backward outside it where a model recomputes its activations.

    Raises:
        ValueError: If the model has no MoE layer, a prefix matches none, or a mask does not fit a layer's input.
        TypeError: If a mask is not bool.

    Source: this adapter is not in the paper.
    """
    masks = masks or {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
    if not layers:
        raise ValueError(
            f"model: {type(model).__name__} contains no MoELayer; upcycle it or build it with MoEFeedForward"
        )
    for prefix in masks:
        if not any(_is_prefix(prefix, name) for name in layers):
            raise ValueError(f"masks: {prefix!r} matches no MoE layer; accepted are prefixes of {sorted(layers)}")
    records: dict[str, list[MoERecord]] = {name: [] for name in layers}
    handles = []
    try:
        for name, layer in layers.items():
            prefixes = [prefix for prefix in masks if _is_prefix(prefix, name)]
            if prefixes:
                add_mask = _mask_hook(name, masks[max(prefixes, key=len)])
                handles.append(layer.register_forward_pre_hook(add_mask, with_kwargs=True))
            handles.append(layer.register_forward_hook(_record_hook(records[name])))
        yield records
    finally:
        for handle in handles:
            handle.remove()


def _mask_hook(name: str, mask: Tensor) -> Any:
    def add_mask(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        _check_mask(mask, args[0] if args else kwargs["x"], where=f" of layer {name!r}")
        return args, {**kwargs, "mask": mask}

    return add_mask


def _record_hook(records: list[MoERecord]) -> Any:
    def keep(layer: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, MoERecord]) -> None:
        records.append(output[1])

    return keep


def _is_prefix(prefix: str, name: str) -> bool:
    return prefix in ("", name) or name.startswith(f"{prefix}.")


def _check_mask(mask: Tensor | None, x: Tensor, where: str = "") -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"mask{where}: got dtype {mask.dtype}; accepted is torch.bool: pass attention_mask.bool()")
    if mask.shape != x.shape[:-1]:
        raise ValueError(
            f"mask{where}: got shape {tuple(mask.shape)} for x of shape {tuple(x.shape)}; accepted is "
            f"{tuple(x.shape[:-1])}: give one bool per token"
        )
