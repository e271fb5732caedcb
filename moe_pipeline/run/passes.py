"""One forward and one backward of the layer: what each stage of a schedule does for a chunk.

Legend: T tokens, K rows per token at most, S rows this rank sends (all chunks, in the order they travel), R rows of one
chunk that its experts compute, M model width.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_pipeline.plan.call import CallPlan
from moe_pipeline.plan.rings import RingSize, row_rings
from moe_pipeline.plan.schedule import Stage
from moe_pipeline.run.adaptive import StepClock
from moe_pipeline.run.buffers import HostCopies, Rings
from moe_pipeline.run.comm import Message, Place, exchange_rows
from moe_pipeline.run.executor import Handler, execute
from moe_pipeline.run.runtime import Runtime
from moe_pipeline.run.stages import ChunkExperts


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """What forward and backward of one call share.

    Source: not in the paper.
    """

    plan: CallPlan
    experts: ChunkExperts
    token_S: Tensor
    """int64, the token each sent row is a copy of."""
    row_TK: Tensor
    """int64, the sent rows of each token; S where a token has fewer than K."""
    sort_R: Sequence[Tensor] | None
    """Chunk -> int64, received rows in the order of experts; None where they come so."""
    unsort_R: Sequence[Tensor] | None
    """Chunk -> int64, the way back."""
    runtime: Runtime
    clock: StepClock | None = None
    """Times both passes, where their time says what to choose."""


class _Pass:
    """What both passes do with rows: gather, send, sort, and find buffers."""

    backward = False

    def __init__(self, call: Call, width: int, like: Tensor) -> None:
        self._call, self._plan, self._partition = call, call.plan, call.plan.partition
        self._experts, self._width, self._dtype, self._device = call.experts, width, like.dtype, like.device
        self._bounds = [0]
        for chunk in range(self._partition.num_chunks):
            self._bounds.append(self._bounds[-1] + sum(self._partition.sent_rows(chunk)))
        self._waiting: dict[tuple[str, int], Tensor] = {}

    def _run(self, begin: Callable[[], None], handlers: dict[Stage, Handler]) -> None:
        runtime, plan, clock = self._call.runtime, self._plan, self._call.clock
        schedule = plan.backward if self.backward else plan.forward
        shared = self._ring_sizes() if plan.strategy.shares_buffers else None
        if runtime.recorder is not None:
            runtime.recorder.enter(plan.layer, backward=self.backward)
        self._rings = Rings(shared, workspace=runtime.workspace, device=self._device)
        with self._rings, nullcontext() if clock is None else clock.running():
            begin()
            execute(schedule, handlers, workspace=runtime.workspace, device=self._device, recorder=runtime.recorder)

    def _ring_sizes(self) -> dict[str, RingSize]:
        plan, received = self._plan, self._partition.max_received_rows
        rows = row_rings(
            self._partition,
            plan.depths,
            width=self._width,
            element_bytes=self._dtype.itemsize,
            backward=self.backward,
            resends=plan.strategy.dispatched == "resend",
        )
        return {**rows, **self._experts.rings(received, backward=self.backward)}

    def _sent(self, chunk: int) -> slice:
        return slice(self._bounds[chunk], self._bounds[chunk + 1])

    def _counts(self, chunk: int) -> tuple[int, ...]:
        return self._partition.expert_rows(chunk)

    def _buffer(self, name: str, chunk: int, rows: int) -> Tensor:
        return self._rings.buffer(name, chunk, rows, self._width, self._dtype)

    def _gather(self, from_TM: Tensor, chunk: int, *, staging: str, arrived: str) -> Tensor:
        """Rows to send; alone, they have arrived already."""
        token_R = self._call.token_S[self._sent(chunk)]
        name = staging if self._plan.exchanges else arrived
        rows_RM = self._buffer(name, chunk, len(token_R))
        torch.index_select(from_TM, 0, token_R, out=rows_RM)
        self._waiting[name, chunk] = rows_RM
        return rows_RM

    def _send_out(self, chunk: int, stage: Stage, *, staging: str, arrived: str) -> Message:
        """To the ranks that hold the experts."""
        sent, received = self._partition.sent_rows(chunk), self._partition.received_rows(chunk)
        rows_RM = self._waiting.pop((staging, chunk))
        out_RM = self._waiting[arrived, chunk] = self._buffer(arrived, chunk, sum(received))
        return self._exchange(out_RM, rows_RM, received=received, sent=sent, chunk=chunk, stage=stage)

    def _send_back(self, out_RM: Tensor, chunk: int, stage: Stage) -> Message:
        """To the ranks that hold the tokens."""
        sent, received = self._partition.sent_rows(chunk), self._partition.received_rows(chunk)
        rows_RM = self._waiting.pop(("result", chunk))
        return self._exchange(out_RM, rows_RM, received=sent, sent=received, chunk=chunk, stage=stage)

    def _exchange(
        self, out_RM: Tensor, rows_RM: Tensor, *, received: list[int], sent: list[int], chunk: int, stage: Stage
    ) -> Message:
        ranks = self._call.runtime.ranks
        assert ranks is not None, "a schedule without other ranks sends nothing"
        config = self._plan.config
        return exchange_rows(
            out_RM,
            rows_RM,
            received=received,
            sent=sent,
            ranks=ranks,
            place=Place(self._plan.layer, self.backward, chunk, self._partition.num_chunks, stage),
            timeout_s=config.timeout_s,
            free=self._rings.free,
        )

    def _sorted(self, chunk: int, *, arrived: str, into: str) -> Tensor:
        """What arrived, ordered by expert."""
        rows_RM = self._waiting.pop((arrived, chunk))
        if self._call.sort_R is None:
            return rows_RM
        out_RM = self._buffer(into, chunk, len(rows_RM))
        torch.index_select(rows_RM, 0, self._call.sort_R[chunk], out=out_RM)
        self._rings.free(rows_RM)
        return out_RM

    def _compute_result(self, chunk: int, whole_SM: Tensor, compute: Callable[[Tensor], None]) -> None:
        """Let experts write rows to where they are sent back from; alone, to where they belong."""
        rows = sum(self._counts(chunk))
        if not self._plan.exchanges:
            compute(whole_SM[self._sent(chunk)])
            return
        result_RM = self._waiting["result", chunk] = self._buffer("result", chunk, rows)
        if self._call.unsort_R is None:
            compute(result_RM)
            return
        unsorted_RM = self._buffer("unsorted", chunk, rows)
        compute(unsorted_RM)
        torch.index_select(unsorted_RM, 0, self._call.unsort_R[chunk], out=result_RM)

    def _sum_rows(self, rows_SM: Tensor, weight_TK: Tensor | None) -> Tensor:
        """Every token's rows, times their weights, added up in the order of its choices."""
        row_TK = self._call.row_TK
        sum_TM: Tensor | None = None
        for choice in range(row_TK.shape[1]):
            part_TM = rows_SM.index_select(0, row_TK[:, choice])
            if weight_TK is None:
                sum_TM = part_TM if sum_TM is None else sum_TM.add_(part_TM)
            elif sum_TM is None:
                wide = torch.promote_types(weight_TK.dtype, part_TM.dtype) == part_TM.dtype
                weight_T1 = weight_TK[:, :1]
                sum_TM = part_TM.mul_(weight_T1) if wide else part_TM * weight_T1
            else:
                sum_TM.addcmul_(part_TM.to(sum_TM.dtype), weight_TK[:, choice : choice + 1].to(sum_TM.dtype))
        if sum_TM is None:
            return rows_SM.new_zeros(len(row_TK), self._width)
        return sum_TM.to(rows_SM.dtype)

    def _whole(self) -> tuple[Tensor, Tensor]:
        """Rows of all chunks, and the same with a row of zeros behind where some token has fewer than K rows."""
        num_rows, padded = self._bounds[-1], self._bounds[-1] != self._call.row_TK.numel()
        padded_SM = torch.empty(num_rows + padded, self._width, dtype=self._dtype, device=self._device)
        if padded:
            padded_SM[num_rows:].zero_()
        return padded_SM[:num_rows], padded_SM


class ForwardPass(_Pass):
    """x to y.

    Args:
        call: The call.
        x_TM: Tokens, in the dtype the experts compute in.
        weight_S: Weight of every sent row.
        keep: Whether backward will come.

    Source: MPipeMoE (arXiv:2506.22175) sections II-A, III-B and III-D.
    """

    def __init__(self, call: Call, x_TM: Tensor, weight_S: Tensor, *, keep: bool) -> None:
        super().__init__(call, x_TM.shape[1], x_TM)
        self._x_TM, self._weight_S, self._keep = x_TM, weight_S, keep
        self._rows: dict[int, Tensor] = {}
        self._host: dict[int, Tensor] = {}
        self._host_copies: HostCopies | None = None
        self._output_SM, self._padded_SM = self._whole()

    def run(self) -> "Passed":
        """Do it.

        Returns:
            y and what backward needs.

        Source: MPipeMoE (arXiv:2506.22175) section III-D.
        """
        handlers: dict[Stage, Handler] = {
            "gather": lambda c: _no(self._gather(self._x_TM, c, staging="staging", arrived="arrived")),
            "dispatch": lambda c: self._send_out(c, "dispatch", staging="staging", arrived="arrived"),
            "up": self._up,
            "offload_dispatched": self._offload_dispatched,
            "offload_hidden": self._experts.offload_hidden,
            "down": self._down,
            "combine": lambda c: self._send_back(self._output_SM[self._sent(c)], c, "combine"),
            "sum": self._sum,
        }
        self._run(self._begin, handlers)
        kept_rows = [self._rows[chunk] for chunk in sorted(self._rows)]
        return Passed(self._y_TM, self._output_SM, kept_rows, self._experts.kept(), self._host, self._host_copies)

    def _begin(self) -> None:
        chunk_rows = [sum(self._counts(chunk)) for chunk in range(self._partition.num_chunks)]
        self._experts.begin_forward(self._rings, chunk_rows, keep=self._keep)
        if self._keep and self._plan.strategy.dispatched == "offload":
            size = self._dtype.itemsize
            num_bytes = sum(RingSize(1, rows, self._width, size).num_bytes for rows in chunk_rows)
            self._host_copies = HostCopies(num_bytes, workspace=self._call.runtime.workspace, device=self._device)

    def _up(self, chunk: int) -> None:
        rows_RM = self._rows[chunk] = self._sorted(chunk, arrived="arrived", into="sorted")
        self._experts.up(chunk, rows_RM, self._counts(chunk))
        if not self._keep or self._plan.strategy.dispatched == "resend":
            del self._rows[chunk]

    def _offload_dispatched(self, chunk: int) -> None:
        if self._host_copies is not None:
            self._host[chunk] = self._host_copies.put(self._rows.pop(chunk))

    def _down(self, chunk: int) -> None:
        counts = self._counts(chunk)
        self._compute_result(chunk, self._output_SM, lambda out_RM: self._experts.down(chunk, counts, out_RM=out_RM))

    def _sum(self, chunk: int) -> None:
        padded_S = torch.cat([self._weight_S, self._weight_S.new_zeros(1)])
        self._y_TM = self._sum_rows(self._padded_SM, padded_S[self._call.row_TK])


@dataclass(frozen=True, eq=False)
class Passed:
    """What a forward leaves for its backward.

    Source: MPipeMoE (arXiv:2506.22175) Table II.
    """

    y_TM: Tensor
    output_SM: Tensor
    """T_O: backward finds the weights' gradients in it."""
    rows: list[Tensor]
    """T_DI of every chunk, where it is kept."""
    hidden: list[Tensor]
    """T_M of every chunk, where it is kept."""
    host: dict[int, Tensor]
    """Chunk -> T_DI, where it is offloaded."""
    host_copies: HostCopies | None


class BackwardPass(_Pass):
    """Gradients of x, of the rows' weights and of the experts' parameters.

    Args:
        call: The call.
        grad_TM: Gradient of y.
        x_TM: Tokens, where T_DI is sent again; else None.
        weight_S: Weight of every sent row.
        passed: What forward left.
        needs: Which of the experts' parameters need a gradient.

    Source: MPipeMoE (arXiv:2506.22175) section III-D.
    """

    backward = True

    def __init__(
        self,
        call: Call,
        grad_TM: Tensor,
        x_TM: Tensor | None,
        weight_S: Tensor,
        passed: Passed,
        *,
        needs: Sequence[bool],
    ) -> None:
        super().__init__(call, grad_TM.shape[1], passed.output_SM)
        self._grad_TM, self._x_TM, self._weight_S, self._passed = grad_TM, x_TM, weight_S, passed
        self._needs = needs
        self._rows: dict[int, Tensor] = dict(enumerate(passed.rows))
        self._grads: dict[int, Tensor] = {}
        self.grad_weight_S = torch.empty_like(weight_S)

    def run(self) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Do it.

        Returns:
            Gradients of x, of the weights, and of the parameters.

        Source: MPipeMoE (arXiv:2506.22175) section III-D.
        """
        if self._passed.host_copies is not None:
            self._passed.host_copies.check()
        handlers: dict[Stage, Handler] = {
            "gather_grad": self._gather_grad,
            "dispatch_grad": lambda c: self._send_out(c, "dispatch_grad", staging="staging", arrived="arrived"),
            "regather": lambda c: _no(self._gather(self._input(), c, staging="input_staging", arrived="input")),
            "resend": lambda c: self._send_out(c, "resend", staging="input_staging", arrived="input"),
            "fetch_dispatched": self._fetch_dispatched,
            "fetch_hidden": lambda c: self._experts.fetch_hidden(c, self._counts(c)),
            "recompute": lambda c: self._experts.recompute(c, self._rows_of(c), self._counts(c)),
            "dgrad": self._dgrad,
            "combine_grad": lambda c: self._send_back(self._grad_input_SM[self._sent(c)], c, "combine_grad"),
            "wgrad": self._wgrad,
            "sum_grad": self._sum_grad,
        }
        self._run(self._begin, handlers)
        if self._passed.host_copies is not None:
            self._passed.host_copies.release()
        return self._grad_x_TM, self.grad_weight_S, self._experts.gradients()

    def _begin(self) -> None:
        self._experts.begin_backward(self._rings, self._passed.hidden, self._needs)
        self._grad_input_SM, self._padded_SM = self._whole()

    def _input(self) -> Tensor:
        assert self._x_TM is not None, "strategies that send again keep x"
        return self._x_TM

    def _gather_grad(self, chunk: int) -> None:
        rows_RM = self._gather(self._grad_TM, chunk, staging="staging", arrived="arrived")
        sent = self._sent(chunk)
        wide = self._weight_S.dtype
        output_RM = self._passed.output_SM[sent]
        self.grad_weight_S[sent] = torch.mul(rows_RM.to(wide), output_RM.to(wide)).sum(1)
        torch.mul(rows_RM, self._weight_S[sent].unsqueeze(1), out=rows_RM)

    def _fetch_dispatched(self, chunk: int) -> None:
        rows_RM = self._buffer("input", chunk, sum(self._counts(chunk)))
        self._rows[chunk] = rows_RM.copy_(self._passed.host[chunk], non_blocking=True)

    def _rows_of(self, chunk: int) -> Tensor:
        """T_DI of a chunk; what was sent again is sorted when it is first asked for."""
        if chunk not in self._rows:
            self._rows[chunk] = self._sorted(chunk, arrived="input", into="input_sorted")
        return self._rows[chunk]

    def _dgrad(self, chunk: int) -> None:
        grad_RM = self._grads[chunk] = self._sorted(chunk, arrived="arrived", into="sorted")
        rows_RM = self._rows_of(chunk) if self._plan.input_for_dgrad else None
        counts = self._counts(chunk)
        self._compute_result(
            chunk,
            self._grad_input_SM,
            lambda out_RM: self._experts.dgrad(chunk, grad_RM, rows_RM, counts, out_RM=out_RM),
        )

    def _wgrad(self, chunk: int) -> None:
        grad_RM = self._grads.pop(chunk)
        self._experts.wgrad(chunk, grad_RM, self._rows_of(chunk), self._counts(chunk))
        self._rings.free(grad_RM)
        self._rows.pop(chunk)

    def _sum_grad(self, chunk: int) -> None:
        self._grad_x_TM = self._sum_rows(self._padded_SM, None)


def _no(_: object) -> None:
    """A handler that sends no message."""
