"""Schedule: the operations of a forward or a backward, the stream each runs on, and what each waits for.

Operations stand in the order in which they are issued; on one stream they also run in that order. On the stream of
messages that is the paper's S1 S2 R1 S3 R2 ...: a chunk's results travel before the next chunk but one is sent.

| paper | here (forward) | here (backward) |
| --- | --- | --- |
| S | dispatch | dispatch_grad: the gradient of T_O to the experts; resend: T_I once more |
| C | up, down | recompute, dgrad, wgrad |
| R | combine | combine_grad |
| H, D | offload_dispatched, offload_hidden | fetch_dispatched, fetch_hidden |
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from moe_pipeline.plan.strategy import RingDepths, Strategy

Stream = Literal["compute", "comm", "copy"]
Stage = Literal[
    "gather", "dispatch", "up", "down", "combine", "sum", "offload_dispatched", "offload_hidden",
    "gather_grad", "dispatch_grad", "regather", "resend", "fetch_dispatched", "fetch_hidden", "recompute", "dgrad",
    "combine_grad", "wgrad", "sum_grad",
]  # fmt: skip
LOOKAHEAD = 2  # chunks under way at once: one travels while one is computed

_STREAMS: dict[str, Stream] = {
    "dispatch": "comm",
    "combine": "comm",
    "dispatch_grad": "comm",
    "resend": "comm",
    "combine_grad": "comm",
    "offload_dispatched": "copy",
    "offload_hidden": "copy",
    "fetch_dispatched": "copy",
    "fetch_hidden": "copy",
}


@dataclass(frozen=True)
class Op:
    """One operation of one chunk.

    Source: MPipeMoE (arXiv:2506.22175) figure 7.
    """

    stage: Stage
    chunk: int
    waits: tuple[int, ...] = ()
    """Positions of earlier operations, on other streams, that must be over before this one starts."""

    @property
    def stream(self) -> Stream:
        """Where it runs; Source: MPipeMoE (arXiv:2506.22175) section III-D."""
        return _STREAMS.get(self.stage, "compute")

    def __str__(self) -> str:
        return f"{self.stage}{self.chunk + 1}"


@dataclass(frozen=True)
class Schedule:
    """Operations in the order they are issued.

    Source: MPipeMoE (arXiv:2506.22175) sections III-B and III-D; the waits are derived from the buffers' depths.
    """

    ops: tuple[Op, ...]

    def stream(self, name: Stream) -> tuple[Op, ...]:
        """The operations of one stream, in its order; not in the paper."""
        return tuple(op for op in self.ops if op.stream == name)

    def __str__(self) -> str:
        lines = []
        for name in ("compute", "comm", "copy"):
            ops = self.stream(name)
            if ops:
                lines.append(f"{name:8}" + " ".join(map(str, ops)))
        return "\n".join(lines)


def forward_schedule(
    num_chunks: int, strategy: Strategy, depths: RingDepths, *, exchanges: bool, overlap: bool = True
) -> Schedule:
    """The forward of a layer.

    Args:
        num_chunks: n.
        strategy: What is kept; without shared buffers every chunk has its own and waits for none.
        depths: Buffers per ring.
        exchanges: Whether there are other ranks; alone, nothing is sent.
        overlap: Off makes every operation wait for the one before it.

    Returns:
        The schedule.

    Source: MPipeMoE (arXiv:2506.22175) sections III-B and III-D, figure 7(a); the waits on buffers are section 6 of our
    reading, derived from it.
    """
    plan = _Builder(strategy, exchanges=exchanges, overlap=overlap)

    def send(chunk: int) -> None:
        input_free = [plan.reuse(stage, chunk, depths.dispatched) for stage in ("up", "offload_dispatched")]
        staging_free = [plan.reuse("dispatch", chunk, depths.staging)] if exchanges else input_free
        plan.add("gather", chunk, after=staging_free)
        plan.add("dispatch", chunk, after=[("gather", chunk), *input_free])

    for chunk in range(min(LOOKAHEAD if overlap else 1, num_chunks)):
        send(chunk)
    for chunk in range(num_chunks):
        plan.add("up", chunk, after=[("dispatch", chunk), plan.reuse("offload_hidden", chunk, depths.hidden)])
        if strategy.dispatched == "offload":
            plan.add("offload_dispatched", chunk, after=[("up", chunk)])
        if strategy.hidden == "offload":
            plan.add("offload_hidden", chunk, after=[("up", chunk)])
        plan.add("down", chunk, after=[plan.reuse("combine", chunk, depths.result)])
        plan.add("combine", chunk, after=[("down", chunk)])
        following = chunk + (LOOKAHEAD if overlap else 1)
        if following < num_chunks:
            send(following)
    plan.add("sum", num_chunks - 1, after=_all(num_chunks, "combine", "offload_dispatched", "offload_hidden"))
    return plan.schedule()


def backward_schedule(
    num_chunks: int,
    strategy: Strategy,
    depths: RingDepths,
    *,
    exchanges: bool,
    overlap: bool = True,
    input_for_dgrad: bool = False,
) -> Schedule:
    """The backward of a layer; products of weight gradients run under the message that was just sent.

    Args:
        num_chunks: n.
        strategy: How T_DI and T_M come back.
        depths: Buffers per ring.
        exchanges: Whether there are other ranks.
        overlap: Off makes every operation wait for the one before it.
        input_for_dgrad: Whether the experts need T_DI for the gradient of T_DI too, as arbitrary modules may.

    Returns:
        The schedule.

    Source: MPipeMoE (arXiv:2506.22175) section III-D, figure 7; weight gradients under messages: Lancet (MLSys 2024).
    """
    plan = _Builder(strategy, exchanges=exchanges, overlap=overlap)

    def send(chunk: int) -> None:
        plan.add("gather_grad", chunk, after=[plan.reuse("dispatch_grad", chunk, depths.staging)])
        plan.add("dispatch_grad", chunk, after=[("gather_grad", chunk), plan.reuse("wgrad", chunk, depths.dispatched)])
        input_free = plan.reuse("wgrad", chunk, depths.dispatched)
        if strategy.dispatched == "offload":
            plan.add("fetch_dispatched", chunk, after=[input_free])
        if strategy.dispatched == "resend":
            plan.add("regather", chunk, after=[plan.reuse("resend", chunk, depths.staging)])
            plan.add("resend", chunk, after=[("regather", chunk), input_free])
        if strategy.hidden == "offload":
            plan.add("fetch_hidden", chunk, after=[plan.reuse("wgrad", chunk, depths.hidden)])

    for chunk in range(min(LOOKAHEAD if overlap else 1, num_chunks)):
        send(chunk)
    for chunk in range(num_chunks):
        following = chunk + (LOOKAHEAD if overlap else 1)
        input_back = [("resend", chunk), ("fetch_dispatched", chunk)]
        if strategy.hidden == "recompute":
            plan.add("recompute", chunk, after=input_back)
        needed = [("dispatch_grad", chunk), ("fetch_hidden", chunk), *(input_back if input_for_dgrad else [])]
        plan.add("dgrad", chunk, after=[*needed, plan.reuse("combine_grad", chunk, depths.result)])
        plan.add("combine_grad", chunk, after=[("dgrad", chunk)])
        early = not strategy.shares_buffers and overlap  # only then is there a buffer for it before wgrad is over
        if early and following < num_chunks:
            send(following)
        plan.add("wgrad", chunk, after=input_back)
        if not early and following < num_chunks:
            send(following)
    plan.add("sum_grad", num_chunks - 1, after=_all(num_chunks, "combine_grad"))
    return plan.schedule()


Wait = tuple[str, int]


def _all(num_chunks: int, *stages: str) -> list[Wait]:
    return [(stage, chunk) for stage in stages for chunk in range(num_chunks)]


class _Builder:
    """Collects operations; a wait for an operation that is not in the schedule is no wait."""

    def __init__(self, strategy: Strategy, *, exchanges: bool, overlap: bool) -> None:
        self._shares, self._exchanges, self._overlap = strategy.shares_buffers, exchanges, overlap
        self._ops: list[Op] = []
        self._positions: dict[Wait, int] = {}

    def reuse(self, stage: str, chunk: int, depth: int) -> Wait:
        """The operation that must be over before a chunk takes a ring's buffer: the same stage, `depth` chunks ago."""
        return stage, chunk - depth if self._shares else -1

    def add(self, stage: Stage, chunk: int, *, after: Iterable[Wait]) -> None:
        op = Op(stage, chunk)
        if op.stream == "comm" and not self._exchanges:
            return
        waits = {self._positions[wait] for wait in after if wait in self._positions}
        if not self._overlap and self._ops:
            waits.add(len(self._ops) - 1)
        others = tuple(sorted(position for position in waits if self._ops[position].stream != op.stream))
        self._positions[stage, chunk] = len(self._ops)
        self._ops.append(Op(stage, chunk, others))

    def schedule(self) -> Schedule:
        return Schedule(tuple(self._ops))
