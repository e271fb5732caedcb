"""The MoE layer, and how to reach the MoE layers buried inside a model.

Legend: T tokens, M model width, E experts.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_pipeline.config import PipelineConfig
from moe_pipeline.dispatch import apply_experts
from moe_pipeline.gate import Gate
from moe_pipeline.losses import RouterLosses
from moe_pipeline.parallel import check_replication
from moe_pipeline.run.adaptive import Adaptive
from moe_pipeline.run.buffers import Workspace
from moe_pipeline.run.ranks import ExpertRanks, mark_spread
from moe_pipeline.run.recorder import Recorder
from moe_pipeline.run.runtime import Runtime


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
    """int64, rows each expert computed of this rank's tokens."""
    dropped: float
    """Fraction of the chosen (token, expert) pairs that a capacity limit turned away."""


class MoELayer(nn.Module):
    """Gate, routing, experts: a feed-forward layer of which each token uses a few experts.

    With `ranks`, experts are spread over processes: rows travel to the rank that holds their expert and back, in chunks
    whose messages hide behind the experts' compute. Ranks may have different numbers of tokens, none included.

    Args:
        gate: Assigns tokens to experts, those of other ranks included.
        experts: `FeedForwardExperts`, `ModuleExperts`, or any module with `num_experts` and forward(rows, counts); with
            `ranks`, this rank's share of them.
        pipeline: Chunks, and what is kept for backward.
        ranks: Who shares the experts; None keeps all of them here.
        workspace: Memory shared by layers that are given the same one; None makes one for this layer.
        name: What errors and timelines call this layer; it must be the same on every rank.

    Raises:
        ValueError: If gate, experts and ranks disagree about the number of experts, or chunks about that of ranks.

    Source: MPipeMoE (arXiv:2506.22175) sections II-A, III-B and III-D.
    """

    def __init__(
        self,
        gate: Gate,
        experts: nn.Module,
        *,
        pipeline: PipelineConfig | None = None,
        ranks: ExpertRanks | None = None,
        workspace: Workspace | None = None,
        name: str = "moe",
    ) -> None:
        super().__init__()
        self.gate, self.experts = gate, experts
        self.pipeline = pipeline or PipelineConfig()
        self.ranks, self.name = ranks, name
        self.workspace = workspace or Workspace()
        self.recorder: Recorder | None = None
        self.adaptive = Adaptive(self.pipeline, name) if self.pipeline.chooses else None
        _check_sizes(gate.config.num_experts, experts, self.pipeline, ranks)
        if ranks is not None:
            mark_spread(experts.parameters(), ranks)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.ranks is not None:  # a copy's parameters come without marks
            mark_spread(self.experts.parameters(), self.ranks)

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
            RankError: If another rank does something else, failed, or does not answer.
            RuntimeError: If a DistributedDataParallel around it takes spread experts for copies.

        Source: MPipeMoE (arXiv:2506.22175) section II-A; the mask is not in the paper.
        """
        _check_mask(mask, x)
        average = False
        if self.ranks is not None:
            average = mark_spread(self.experts.parameters(), self.ranks)  # some may be new
            check_replication(self.experts, name=self.name)
        x_TM = x.reshape(-1, x.shape[-1])
        assignment = self.gate(x_TM, mask_T=None if mask is None else mask.reshape(-1))
        y_TM, counts = apply_experts(
            x_TM,
            assignment,
            self.experts,
            num_experts=self.gate.config.num_experts,
            top_k=self.gate.config.top_k,
            pipeline=self.pipeline,
            runtime=Runtime(
                name=self.name,
                ranks=self.ranks,
                workspace=self.workspace,
                average=average,
                recorder=self.recorder,
                adaptive=self.adaptive,
            ),
        )
        record = MoERecord(
            loss=assignment.losses.total(self.gate.config),
            losses=assignment.losses,
            load_E=torch.tensor(counts, device=x.device),
            dropped=1 - sum(counts) / assignment.num_chosen if assignment.num_chosen else 0.0,
        )
        return y_TM.view(x.shape), record


def _check_sizes(num_experts: int, experts: nn.Module, pipeline: PipelineConfig, ranks: ExpertRanks | None) -> None:
    here = getattr(experts, "num_experts", None)
    expected = num_experts if ranks is None else ranks.local_experts(num_experts)
    if here != expected:
        share = "" if ranks is None else f" shared by {ranks.size} ranks, {expected} on each"
        raise ValueError(
            f"experts: got num_experts={here}; accepted is the gate's num_experts={num_experts}{share}: build both "
            "from one GateConfig"
            + ("" if ranks is None else ", and take this rank's part with local_part(experts, ranks)")
        )
    num_ranks = 1 if ranks is None else ranks.size
    if pipeline.split == "ranks" and pipeline.num_chunks != num_ranks:
        raise ValueError(
            f"pipeline.num_chunks: got {pipeline.num_chunks} with split='ranks'; accepted is the number of ranks, "
            f"{num_ranks}"
        )


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


@contextmanager
def recorded(model: nn.Module) -> Iterator[Recorder]:
    """Note when every operation of the MoE layers inside a model runs, forward and backward.

    Args:
        model: Any model that contains `MoELayer`s, or one itself.

    Yields:
        The recorder; call its `timeline()` after the block.

    Raises:
        ValueError: If the model has no MoE layer.

    Source: this adapter is not in the paper.
    """
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    if not layers:
        raise ValueError(f"model: {type(model).__name__} contains no MoELayer; there is nothing to record")
    recorder = Recorder()
    before = [layer.recorder for layer in layers]
    try:
        for layer in layers:
            layer.recorder = recorder
        yield recorder
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.recorder = old


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
