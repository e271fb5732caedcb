"""Hugging Face's experts interface: the MoE models of that library compute on this package's runtime, unchanged.

    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    ALL_EXPERTS_FUNCTIONS.register("moe_pipeline", experts_forward())
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="moe_pipeline")

Experts modules are recognised by the names, shapes and flags that the library gives them (its decorator
`use_experts_implementation`), and the library itself is never imported.

Legend: T tokens, K experts per token, A entries of the assignment, E experts over all ranks, L experts here, M model
width, H hidden width, G width of the first product (H, or 2H for gated experts), I inputs and O outputs of a product.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from moe_pipeline.config import PipelineConfig
from moe_pipeline.dispatch import apply_experts
from moe_pipeline.experts import FeedForwardExperts, GroupedLinear
from moe_pipeline.gate import Assignment
from moe_pipeline.losses import RouterLosses
from moe_pipeline.parallel import check_replication
from moe_pipeline.run.adaptive import Adaptive
from moe_pipeline.run.buffers import Workspace
from moe_pipeline.run.ranks import ExpertRanks, mark_spread
from moe_pipeline.run.runtime import Runtime
from moe_pipeline.run.stages import plain_function

ExpertsForward = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]

_RECORD = "_moe_pipeline_whole"  # where a module keeps its `_Spread`
_ACCEPTED = (
    "experts that compute down(act_fn(gate) * up) from gate_up_proj (experts, 2 * hidden, model) or, with "
    "has_gate=False, down(act_fn(up)) from up_proj (experts, hidden, model), and from down_proj (experts, model, "
    "hidden); weights may be transposed and there may be biases"
)


def experts_forward(
    *, pipeline: PipelineConfig | None = None, ranks: ExpertRanks | None = None, workspace: Workspace | None = None
) -> ExpertsForward:
    """Make the function that the library's registry takes.

    It is called as (experts module, hidden_states (T, M), top_k_index (T, K), top_k_weights (T, K)) and returns (T, M)
    in hidden_states' dtype. Gradients reach the module's own parameters. An index equal to the number of experts marks
    an entry that nobody computes. It raises ValueError for a module that computes something else, or whose share of
    the experts is not that of `ranks`, RankError where ranks do not agree, and RuntimeError where a
    DistributedDataParallel takes spread experts for copies.

    Args:
        pipeline: Chunks, and what is kept for backward.
        ranks: Who shares the experts, after `spread_experts` with the same; None keeps all of them here.
        workspace: Memory shared with other layers; None makes one for all that call this function.

    Returns:
        The function.

    Raises:
        ValueError: If chunks are cut by ranks and their numbers differ.

    Source: MPipeMoE (arXiv:2506.22175) sections II-A and III-B; the interface is not in the paper.
    """
    pipeline, workspace = pipeline or PipelineConfig(), workspace or Workspace()
    choosing: WeakKeyDictionary[nn.Module, Adaptive] = WeakKeyDictionary()
    num_ranks = 1 if ranks is None else ranks.size
    if pipeline.split == "ranks" and pipeline.num_chunks != num_ranks:
        raise ValueError(
            f"pipeline.num_chunks: got {pipeline.num_chunks} with split='ranks'; accepted is the number of ranks, "
            f"{num_ranks}"
        )

    def forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        spread = getattr(module, _RECORD, None)
        name = "experts" if spread is None else spread.name
        view = _view(module, name)
        num_experts = _num_experts(module, view.num_experts, spread, ranks)
        if pipeline.chooses and module not in choosing:
            choosing[module] = Adaptive(pipeline, name)
        average = False
        if ranks is not None:
            average = mark_spread(module.parameters(), ranks)
            check_replication(module, name=name)
        y_TM, _ = apply_experts(
            hidden_states,
            _assignment(top_k_index, top_k_weights, num_experts=num_experts),
            view,
            num_experts=num_experts,
            top_k=top_k_index.shape[-1],
            pipeline=pipeline,
            runtime=Runtime(
                name=name, ranks=ranks, workspace=workspace, average=average, adaptive=choosing.get(module)
            ),
        )
        return y_TM.to(hidden_states.dtype)

    return torch.compiler.disable(forward)  # a compiled model leaves its graph here: the rows per expert must be known


def spread_experts(model: nn.Module, ranks: ExpertRanks) -> list[str]:
    """Keep this rank's share of the experts of every MoE layer, in place; routers and all else stay whole.

    Call it on a model that is whole and equal on every rank, before its optimizer is made. From then on
    `experts_forward(ranks=ranks)` runs it, and no other implementation. These parameters' gradients arrive averaged
    over the ranks; `moe_pipeline.parallel` tells the wrappers of data parallelism so.

    Args:
        model: Any model of the library with stacked experts.
        ranks: Who shares them.

    Returns:
        The names of the parameters of which only a share is here, in the model's order.

    Raises:
        ValueError: If there are no such experts, they compute something `experts_forward` does not know, they are
            spread already, or the ranks cannot share them equally. The model is then as it was.

    Source: MPipeMoE (arXiv:2506.22175) section IV-B.
    """
    found = {name: module for name, module in model.named_modules() if _is_stacked(getattr(module, "down_proj", None))}
    if not found:
        raise ValueError(
            f"model: {type(model).__name__} contains no stacked experts; accepted are models with {_ACCEPTED}"
        )
    totals = {name: _check_whole(module, name or "experts", ranks) for name, module in found.items()}
    names = []
    for name, module in found.items():
        local = ranks.local_experts(totals[name])
        mine = slice(ranks.rank * local, (ranks.rank + 1) * local)
        parts = [part for part in _part_names(module) if part]
        for part in parts:
            whole = getattr(module, part)
            setattr(module, part, nn.Parameter(whole.detach()[mine].clone(), requires_grad=whole.requires_grad))
        mark_spread([getattr(module, part) for part in parts], ranks)
        setattr(module, "num_experts", local)  # noqa: B010  (typed as a Tensor or Module otherwise)
        setattr(module, _RECORD, _Spread(name=name or "experts", num_experts=totals[name]))
        names += [f"{name}.{part}" if name else part for part in parts]
    return names


@dataclass(frozen=True, kw_only=True)
class _Spread:
    """What a module whose experts were spread can no longer say itself."""

    name: str
    num_experts: int


class _Stack(GroupedLinear):
    """One product of another module: its tensors where `GroupedLinear` has its parameters, not copied."""

    def __init__(self, weight_EOI: Tensor, bias_EO: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.num_experts, self.d_out, self.d_in = weight_EOI.shape
        self.weight, self.bias = cast("nn.Parameter", weight_EOI), cast("nn.Parameter | None", bias_EO)


class _View(FeedForwardExperts):
    """Another module's experts as ours; it lives for one call, so that whoever replaces a tensor there is heard."""

    def __init__(self, up: _Stack, down: _Stack, activation: Callable[[Tensor], Tensor], *, gated: bool) -> None:
        nn.Module.__init__(self)
        self.num_experts, self.gated, self.training = up.num_experts, gated, False
        self.up, self.down, self.activation, self.dropout = up, down, activation, nn.Dropout(0.0)


def _view(module: Any, name: str) -> _View:
    has_gate = bool(getattr(module, "has_gate", True))
    _check_function(module, name, has_gate=has_gate)
    names = _part_names(module)
    up, up_bias, down, down_bias = (getattr(module, part, None) if part else None for part in names)
    if not (_is_stacked(up) and _is_stacked(down)) or bool(names[1]) != (up_bias is not None and down_bias is not None):
        raise _refused(module, name, _shapes(module))
    if getattr(module, "is_transposed", False):
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    num_experts, d_model, d_hidden = down.shape
    if up.shape != (num_experts, 2 * d_hidden if has_gate else d_hidden, d_model):
        raise _refused(module, name, _shapes(module))
    called = module.act_fn
    function = plain_function(called) or (lambda value: called(value))  # with hooks or unknown: called as it is
    return _View(_Stack(up, up_bias), _Stack(down, down_bias), function, gated=has_gate)


def _part_names(module: nn.Module) -> tuple[str, str, str, str]:
    """The attributes that hold up, its bias, down and its bias; "" for the biases that do not exist."""
    up = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    has_bias = getattr(module, "has_bias", False)
    return up, f"{up}_bias" if has_bias else "", "down_proj", "down_proj_bias" if has_bias else ""


def _shapes(module: nn.Module) -> str:
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}
    flags = {flag: getattr(module, flag, None) for flag in ("has_gate", "has_bias", "is_transposed")}
    return f"parameters of shapes {shapes} and {flags}"


def _is_stacked(part: object) -> TypeGuard[Tensor]:
    return isinstance(part, Tensor) and part.dim() == 3


def _check_function(module: nn.Module, name: str, *, has_gate: bool) -> None:
    """The module's flags and functions must be those of experts that ours can stand for."""
    gate = getattr(module, "_apply_gate", None)
    if has_gate and gate is not None and getattr(gate, "__name__", "") != "_default_apply_gate":
        raise _refused(module, name, "a gate of its own (_apply_gate)")
    if has_gate and not getattr(module, "is_concatenated", True):
        raise _refused(module, name, "gate and up interleaved (is_concatenated=False)")
    if getattr(module, "has_post_expert_norm", False):
        raise _refused(module, name, "a norm behind each expert (has_post_expert_norm=True)")
    activation = getattr(module, "act_fn", None)
    if not callable(activation):
        raise _refused(module, name, f"act_fn={activation!r}")
    if isinstance(activation, nn.Module) and any(True for _ in activation.parameters()):
        raise _refused(module, name, f"parameters in act_fn={activation!r}")


def _refused(module: nn.Module, name: str, came: str) -> ValueError:
    return ValueError(
        f"{name}: got {type(module).__name__} with {came}; accepted are {_ACCEPTED}: choose another "
        "experts_implementation for this model"
    )


def _assignment(index_TK: Tensor, weight_TK: Tensor, *, num_experts: int) -> Assignment:
    """The library's choices as entries; those of expert `num_experts`, which does not exist, are left out."""
    expert_A, weight_A = index_TK.reshape(-1), weight_TK.reshape(-1)
    entry_A = (expert_A != num_experts).nonzero().squeeze(1)
    if len(entry_A) < len(expert_A):
        expert_A, weight_A = expert_A[entry_A], weight_A[entry_A]
    zero = weight_A.new_zeros(())
    return Assignment(
        token_A=entry_A // max(index_TK.shape[-1], 1),
        expert_A=expert_A,
        weight_A=weight_A.to(torch.promote_types(weight_A.dtype, torch.float32)),
        num_chosen=index_TK.numel(),
        losses=RouterLosses(balance=zero, z=zero, importance=zero),
    )


def _num_experts(module: nn.Module, here: int, spread: _Spread | None, ranks: ExpertRanks | None) -> int:
    """E, if the L experts here are this rank's share of it."""
    total = here if spread is None else spread.num_experts
    name = "experts" if spread is None else spread.name
    if ranks is not None and getattr(module, "_is_expert_parallel", False):
        raise ValueError(
            f"{name}: got experts that the library has spread itself (_is_expert_parallel); accepted with ranks are "
            "whole ones: let spread_experts(model, ranks) spread them, or register experts_forward() without ranks"
        )
    expected = total if ranks is None else ranks.local_experts(total)
    if here != expected:
        size = 1 if ranks is None else ranks.size
        raise ValueError(
            f"{name}: got {here} of {total} experts in this process; accepted is {expected}, the share of one among "
            f"{size}: give the same ranks to spread_experts(model, ranks), once, and to experts_forward(ranks=ranks)"
        )
    return total


def _check_whole(module: nn.Module, name: str, ranks: ExpertRanks) -> int:
    """The number of experts of a module that can be spread."""
    if hasattr(module, _RECORD) or getattr(module, "_is_expert_parallel", False):
        raise ValueError(f"model: {name!r} is spread over ranks already; accepted are whole experts: spread them once")
    num_experts = _view(module, name).num_experts
    ranks.local_experts(num_experts)
    for part in _part_names(module):
        if part and part not in module._parameters:
            raise _refused(module, name, f"{part} that is computed from other parameters")
    return num_experts
