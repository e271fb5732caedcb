"""Dispatch: from an assignment to results, for experts of any kind, here or spread over ranks.

Legend: T tokens, M model width, E experts over all ranks, L experts here.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from moe_pipeline.config import PipelineConfig
from moe_pipeline.experts import FeedForwardExperts, GroupedLinear, ModuleExperts
from moe_pipeline.gate import Assignment
from moe_pipeline.plan.call import CallPlan, plan_call
from moe_pipeline.plan.ledger import LayerShape
from moe_pipeline.plan.partition import partition
from moe_pipeline.plan.rings import HiddenShape
from moe_pipeline.routing import expert_counts, route
from moe_pipeline.run.buffers import Workspace
from moe_pipeline.run.comm import Agreement, Call
from moe_pipeline.run.modules import ModuleChunks
from moe_pipeline.run.pipeline import pipeline as run_pipeline
from moe_pipeline.run.ranks import ExpertRanks
from moe_pipeline.run.runtime import Runtime
from moe_pipeline.run.stages import ChunkExperts, FeedForwardChunks, plain_function, pointwise


def apply_experts(
    x_TM: Tensor,
    assignment: Assignment,
    experts: nn.Module,
    *,
    num_experts: int,
    top_k: int,
    pipeline: PipelineConfig,
    runtime: Runtime,
) -> tuple[Tensor, tuple[int, ...]]:
    """Send tokens to their experts, let these compute, and combine the results.

    Args:
        x_TM: Tokens, any floating dtype.
        assignment: Which expert computes which token.
        experts: This rank's experts.
        num_experts: E.
        top_k: Experts per token, at most or on average.
        pipeline: Chunks, and what is kept for backward.
        runtime: What the layer runs on.

    Returns:
        y_TM in the dtype the experts computed in, and the rows each of the E experts computed of these tokens.

    Raises:
        RankError: If another rank does something else, failed, or does not answer.
        BudgetError: If a choice is left open and none fits in memory.
        ValueError: If there is a budget and nobody knows what the experts allocate.

    Source: MPipeMoE (arXiv:2506.22175) sections II-A and III-B.
    """
    parameters, dtype, stages = _experts_of_call(experts, x_TM, runtime.workspace)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x_TM, assignment.weight_A, *parameters))
    agreed = _agreement(runtime.name, pipeline, num_experts, x_TM.shape[1], dtype, keep)
    counts = expert_counts(assignment, num_experts=num_experts)
    size, rank = (1, 0) if runtime.ranks is None else (runtime.ranks.size, runtime.ranks.rank)
    local = num_experts // size
    sent = tuple(counts[start : start + local] for start in range(0, num_experts, local))
    received, notes = _exchange_counts(agreed, sent, len(x_TM), pipeline.timeout_s, runtime, x_TM.device)
    clock = None
    if runtime.adaptive is not None:
        if stages is _module_chunks:
            _check_no_budget(pipeline, experts)
        shape = _layer_shape(experts, x_TM.shape[1], dtype, num_experts=num_experts, num_ranks=size, top_k=top_k)
        pipeline = runtime.adaptive.choose(
            notes,
            shape,
            received_rows=sum(map(sum, received)),
            timed=keep,
            ranks=runtime.ranks,
            dtype=dtype,
            device=x_TM.device,
        )
        clock = runtime.adaptive.clock(x_TM.device) if keep else None
        agreed = replace(agreed, num_chunks=pipeline.fixed_chunks, restore=pipeline.fixed_restore)
    cut = partition(sent, received, num_chunks=pipeline.fixed_chunks, split=pipeline.split, rank=rank)
    plan = plan_call(runtime.name, pipeline, cut, input_for_dgrad=stages is _module_chunks)
    routing = route(assignment, cut, num_tokens=len(x_TM))
    y_TM = run_pipeline(
        x_TM.to(dtype),
        routing.weight_S,
        parameters,
        plan=plan,
        experts=stages(experts, parameters, plan, runtime.workspace),
        token_S=routing.token_S,
        row_TK=routing.row_TK,
        agreement=agreed,
        runtime=runtime,
        keep=keep,
        clock=clock,
    )
    return y_TM, counts


Counts = tuple[tuple[int, ...], ...]


def _exchange_counts(
    agreed: Call, sent: Counts, num_tokens: int, timeout_s: float, runtime: Runtime, device: torch.device
) -> tuple[Counts, list[list[int]]]:
    """Source rank -> local expert here -> rows, and what every rank notes for choosing; alone, one's own."""
    own = [] if runtime.adaptive is None else runtime.adaptive.notes(num_tokens)
    if runtime.ranks is None:
        return sent, [own]
    agreement = Agreement(agreed, sent, ranks=runtime.ranks, device=device, timeout_s=timeout_s, notes=own)
    return agreement.counts(), agreement.notes()


def _agreement(
    name: str, pipeline: PipelineConfig, num_experts: int, d_model: int, dtype: torch.dtype, differentiable: bool
) -> Call:
    """What ranks must agree about; what is left open is chosen afterwards, by all alike."""
    return Call(
        layer=name,
        backward=False,
        num_experts=num_experts,
        d_model=d_model,
        dtype=str(dtype),
        num_chunks=0 if pipeline.num_chunks == "auto" else pipeline.num_chunks,
        restore=pipeline.restore,
        split=pipeline.split,
        overlap=pipeline.overlap,
        differentiable=differentiable,
    )


def _check_no_budget(pipeline: PipelineConfig, experts: nn.Module) -> None:
    for name in ("device_budget_bytes", "host_budget_bytes"):
        value = getattr(pipeline, name)
        if value is not None:
            raise ValueError(
                f"{name}: got {value} for {type(experts).__name__}, whose memory the ledger does not know; accepted is "
                "None, or FeedForwardExperts without hooks and without dropout in training"
            )


def _layer_shape(
    experts: nn.Module, d_model: int, dtype: torch.dtype, *, num_experts: int, num_ranks: int, top_k: int
) -> LayerShape:
    """The layer's sizes for predictions and ledgers; modules count as plain experts of as many parameters."""
    if isinstance(experts, FeedForwardExperts):
        hidden = HiddenShape(
            d_hidden=experts.down.weight.shape[2],
            gated=experts.gated,
            in_place=pointwise(experts.activation).from_result and not experts.gated,
        )
        bias = experts.up.bias is not None
    else:
        numbers = sum(parameter.numel() for parameter in experts.parameters())
        width = max(1, numbers * num_ranks // (2 * d_model * num_experts))
        hidden, bias = HiddenShape(d_hidden=width, gated=False, in_place=False), False
    return LayerShape(
        tokens=1,
        top_k=top_k,
        d_model=d_model,
        hidden=hidden,
        num_experts=num_experts,
        num_ranks=num_ranks,
        element_bytes=dtype.itemsize,
        bias=bias,
    )


Stages = Callable[[nn.Module, list[Tensor], CallPlan, Workspace], ChunkExperts]


def _experts_of_call(
    experts: nn.Module, x_TM: Tensor, workspace: Workspace
) -> tuple[list[Tensor], torch.dtype, Stages]:
    """The tensors that experts compute with, the dtype they compute in, and how they are cut into stages."""
    device_type = x_TM.device.type
    autocast = torch.is_autocast_enabled(device_type)
    own = torch.get_autocast_dtype(device_type) if autocast else x_TM.dtype
    if not isinstance(experts, FeedForwardExperts):
        return list(experts.parameters()), x_TM.dtype, _module_chunks
    if not _is_plain(experts):
        return list(experts.parameters()), own, _module_chunks
    dtype = own if autocast else experts.up.weight.dtype
    weights = (experts.up.weight, experts.up.bias, experts.down.weight, experts.down.bias)
    return [weight.to(dtype) for weight in weights if weight is not None], dtype, _feed_forward_chunks


def _is_plain(experts: FeedForwardExperts) -> bool:
    """Whether nothing but two maps and an activation happens: no dropout, no hook, nothing that somebody replaced."""
    if type(experts).forward is not FeedForwardExperts.forward:
        return False
    if any(type(linear).forward is not GroupedLinear.forward for linear in (experts.up, experts.down)):
        return False
    if type(experts.dropout) is not nn.Dropout or (experts.dropout.training and experts.dropout.p > 0):
        return False
    if plain_function(experts.activation) is None:
        return False
    return not any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        for module in experts.modules()
    )


def _feed_forward_chunks(
    experts: nn.Module, parameters: list[Tensor], plan: CallPlan, workspace: Workspace
) -> ChunkExperts:
    assert isinstance(experts, FeedForwardExperts)
    given = iter(parameters)
    up, up_bias = next(given), None if experts.up.bias is None else next(given)
    down, down_bias = next(given), None if experts.down.bias is None else next(given)
    return FeedForwardChunks(
        (up, up_bias, down, down_bias),
        pointwise(experts.activation),
        gated=experts.gated,
        strategy=plan.strategy,
        depths=plan.depths,
        num_chunks=plan.partition.num_chunks,
        workspace=workspace,
    )


def _module_chunks(experts: nn.Module, parameters: list[Tensor], plan: CallPlan, workspace: Workspace) -> ChunkExperts:
    device = parameters[0].device if parameters else torch.device("cpu")
    return ModuleChunks(experts, parameters, strategy=plan.strategy, device=device)


def local_part(experts: nn.Module, ranks: ExpertRanks) -> nn.Module:
    """Keep this rank's share of experts that were built whole, in place.

    Args:
        experts: All experts, equal on every rank.
        ranks: Who shares them.

    Returns:
        The same module, now with num_experts / ranks.size experts.

    Raises:
        TypeError: For a kind of experts this does not know how to take apart.
        ValueError: If the ranks cannot share them equally.

    Source: MPipeMoE (arXiv:2506.22175) section IV-B.
    """
    if not isinstance(experts, FeedForwardExperts | ModuleExperts):
        raise TypeError(
            f"experts: got {type(experts).__name__}; accepted are FeedForwardExperts and ModuleExperts: build only "
            "this rank's share of others"
        )
    local = ranks.local_experts(experts.num_experts)
    mine = slice(ranks.rank * local, (ranks.rank + 1) * local)
    experts.num_experts = local
    if isinstance(experts, ModuleExperts):
        experts.experts = nn.ModuleList(list(experts.experts)[mine])
        return experts
    for linear in (experts.up, experts.down):
        linear.num_experts = local
        linear.weight = nn.Parameter(linear.weight.detach()[mine].clone())
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias.detach()[mine].clone())
    return experts
