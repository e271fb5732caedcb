"""The pipelined [dispatch, experts, combine] as one differentiable function of tokens, weights and parameters.

Legend: T tokens, K rows per token at most, S rows sent, M model width.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_pipeline.plan.call import CallPlan
from moe_pipeline.plan.partition import Partition
from moe_pipeline.run import comm
from moe_pipeline.run.adaptive import StepClock
from moe_pipeline.run.comm import Agreement
from moe_pipeline.run.passes import BackwardPass, Call, ForwardPass, Passed
from moe_pipeline.run.ranks import average_over_ranks
from moe_pipeline.run.runtime import Runtime
from moe_pipeline.run.stages import ChunkExperts


def pipeline(
    x_TM: Tensor,
    weight_S: Tensor,
    parameters: Sequence[Tensor],
    *,
    plan: CallPlan,
    experts: ChunkExperts,
    token_S: Tensor,
    row_TK: Tensor,
    agreement: comm.Call,
    runtime: Runtime,
    keep: bool,
    clock: StepClock | None = None,
) -> Tensor:
    """Compute a layer's output; backward runs the plan's other schedule.

    Args:
        x_TM: Tokens, in the dtype the experts compute in.
        weight_S: Weight of every sent row, at least float32.
        parameters: What the experts compute with, so that gradients reach them through autograd.
        plan: What is decided for this call.
        experts: The experts, chunk by chunk.
        token_S: The token of every sent row.
        row_TK: The sent rows of every token.
        agreement: What ranks agreed about in forward, and agree about once more in backward.
        runtime: What the layer runs on.
        keep: Whether backward will come.
        clock: Times both passes.

    Returns:
        y_TM.

    Source: MPipeMoE (arXiv:2506.22175) section III.
    """
    sort_R, unsort_R = _orders(plan.partition, x_TM.device) if plan.sorts else (None, None)
    call = Call(
        plan=plan,
        experts=experts,
        token_S=token_S,
        row_TK=row_TK,
        sort_R=sort_R,
        unsort_R=unsort_R,
        runtime=runtime,
        clock=clock,
    )
    return _Pipeline.apply(x_TM, weight_S, call, agreement, keep, *parameters)


class _Pipeline(torch.autograd.Function):
    """Both passes; what is kept is saved the way autograd saves, so that checkpointing and hooks see it."""

    @staticmethod
    def forward(
        ctx: Any, x_TM: Tensor, weight_S: Tensor, call: Call, agreement: comm.Call, keep: bool, *parameters: Tensor
    ) -> Tensor:
        passed = ForwardPass(call, x_TM, weight_S, keep=keep).run()
        if keep:
            resend = call.plan.strategy.dispatched == "resend"
            ctx.save_for_backward(weight_S, passed.output_SM, x_TM if resend else None, *passed.rows, *passed.hidden)
            ctx.num_rows, ctx.host, ctx.host_copies = len(passed.rows), passed.host, passed.host_copies
            ctx.call, ctx.agreement = call, replace(agreement, backward=True)
        return passed.y_TM

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TM: Tensor) -> tuple[Any, ...]:
        weight_S, output_SM, x_TM, *kept = ctx.saved_tensors
        rows, hidden = kept[: ctx.num_rows], kept[ctx.num_rows :]
        passed = Passed(output_SM, output_SM, rows, hidden, ctx.host, ctx.host_copies)
        call: Call = ctx.call
        ranks = call.runtime.ranks
        if ranks is not None and grad_TM.device.type == "cpu":
            timeout_s = call.plan.config.timeout_s
            Agreement(ctx.agreement, (), ranks=ranks, device=grad_TM.device, timeout_s=timeout_s).counts()
        needs = ctx.needs_input_grad[5:]
        back = BackwardPass(call, grad_TM.contiguous(), x_TM, weight_S, passed, needs=needs)
        grad_x_TM, grad_weight_S, grads = back.run()
        if ranks is not None and call.runtime.average:
            grads = average_over_ranks(grads, ranks)
        return grad_x_TM, grad_weight_S, None, None, None, *grads


def _orders(partition: Partition, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """For every chunk: received rows in the order of experts (and, within one, of ranks), and the way back."""
    sort_R, unsort_R = [], []
    for chunk in range(partition.num_chunks):
        lengths = torch.tensor(partition.received[chunk], dtype=torch.int64).view(-1)
        num_ranks, num_experts = len(partition.received[chunk]), partition.num_experts
        starts = (lengths.cumsum(0) - lengths).view(num_ranks, num_experts).t().flatten()
        lengths = lengths.view(num_ranks, num_experts).t().flatten()
        places = torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        order = (starts.repeat_interleave(lengths) + places).to(device, non_blocking=True)
        sort_R.append(order)
        unsort_R.append(order.argsort())
    return sort_R, unsort_R
