"""What ranks agree on before each pass, and the messages between them.

Before anything of a size that ranks could disagree about
is sent, they exchange one message of fixed size; every wait has an end and says who waited for whom, where.

Legend: E experts over all ranks, L experts of one rank, R rows, M model width.
"""

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from moe_pipeline.run.ranks import ExpertRanks

NUM_NOTES = 4  # numbers that ranks tell each other and need not agree about
MIN_COUNTS = 256  # counts a message has room for: ranks with fewer experts can disagree about anything and still meet


class RankError(RuntimeError):
    """Ranks that share experts do not agree, or one of them did not answer; the message says who, where and when.

    Source: not in the paper.
    """


@dataclass(frozen=True, kw_only=True)
class Call:
    """What ranks must agree about before they exchange rows.

    Source: not in the paper.
    """

    layer: str
    backward: bool
    num_experts: int
    d_model: int
    dtype: str
    num_chunks: int
    restore: str
    split: str
    overlap: bool
    differentiable: bool

    def numbers(self) -> list[int]:
        """One number per field; text is hashed.

        Source: not in the paper.
        """
        return [_number(getattr(self, field.name)) for field in fields(self)]


@dataclass(frozen=True)
class Place:
    """Where in a layer a rank is: what an error says.

    Source: not in the paper.
    """

    layer: str
    backward: bool
    chunk: int
    num_chunks: int
    stage: str

    def __str__(self) -> str:
        direction = "backward" if self.backward else "forward"
        return f"layer {self.layer!r}, {direction}, chunk {self.chunk + 1} of {self.num_chunks}, stage {self.stage}"


class Message:
    """A message under way.

    Args:
        work: The collective; None where it is already ordered on the current CUDA stream.
        ranks: Who takes part.
        place: Where this is, for errors.
        timeout_s: Longest wait, in seconds.
        rows_RM: What is sent; it must outlive the message.
        free: What to do with it then.

    Source: not in the paper.
    """

    def __init__(
        self,
        work: dist.Work | None,
        *,
        ranks: ExpertRanks,
        place: Place,
        timeout_s: float,
        rows_RM: Tensor,
        free: Callable[[Tensor], None] | None,
    ) -> None:
        self._work, self._ranks, self._place, self._timeout_s = work, ranks, place, timeout_s
        self._rows_RM: Tensor | None = rows_RM
        self._free = free

    def wait(self) -> None:
        """Block until the message is over.

        Raises:
            RankError: If another rank failed or did not answer in time.

        Source: not in the paper.
        """
        work, self._work = self._work, None
        if work is None:
            return
        start_s = time.monotonic()
        try:
            work.wait(timedelta(seconds=self._timeout_s))
        except RuntimeError as error:
            raise _failure(self._ranks, self._place, time.monotonic() - start_s, self._timeout_s, error) from error
        if self._free is not None and self._rows_RM is not None:
            self._free(self._rows_RM)
        self._rows_RM = None

    def on_done(self, callback: Callable[[object], None]) -> None:
        """Call back from another thread when the message is over, where it has a handle of its own.

        Source: not in the paper.
        """
        if self._work is not None:
            self._work.get_future().then(callback)


def exchange_rows(
    out_RM: Tensor,
    rows_RM: Tensor,
    *,
    received: Sequence[int],
    sent: Sequence[int],
    ranks: ExpertRanks,
    place: Place,
    timeout_s: float,
    free: Callable[[Tensor], None] | None = None,
) -> Message:
    """Send rows to every rank and receive theirs.

    Args:
        out_RM: Where received rows go, ordered by source rank.
        rows_RM: Rows to send, ordered by destination rank.
        received: Rows from each rank.
        sent: Rows for each rank.
        ranks: Who takes part.
        place: Where this is, for errors.
        timeout_s: Longest wait, in seconds.
        free: What to do with the sent rows when the message is over.

    Returns:
        The message; on CUDA it is ordered on the current stream and needs no waiting on the host.

    Source: MPipeMoE (arXiv:2506.22175) section II-A, stages S and R.
    """
    asynchronous = out_RM.device.type == "cpu"
    try:
        work = dist.all_to_all_single(
            out_RM, rows_RM, list(received), list(sent), group=ranks.experts, async_op=asynchronous
        )
    except RuntimeError as error:
        raise _failure(ranks, place, 0.0, timeout_s, error) from error
    return Message(work, ranks=ranks, place=place, timeout_s=timeout_s, rows_RM=rows_RM, free=free)


class Agreement:
    """One message of fixed size that carries what ranks must agree about, and every rank's counts.

    Args:
        call: What this rank is about to do.
        counts: Destination rank -> local expert there -> rows; empty where only agreement is asked.
        ranks: Who takes part.
        device: Where messages must lie.
        timeout_s: Longest wait, in seconds.
        notes: Numbers to tell every rank, which need not be the same; at most `NUM_NOTES`.

    Source: MPipeMoE (arXiv:2506.22175) section III-B exchanges sizes per partition; one message for all is ours.
    """

    def __init__(
        self,
        call: Call,
        counts: Sequence[Sequence[int]],
        *,
        ranks: ExpertRanks,
        device: torch.device,
        timeout_s: float,
        notes: Sequence[int] = (),
    ) -> None:
        self._call, self._ranks = call, ranks
        self._messages: list[list[int]] = []
        self._num_counts = len(counts[0]) if counts else 0
        room = max(MIN_COUNTS, self._num_counts)
        header = [*call.numbers(), *notes, *[0] * (NUM_NOTES - len(notes))]
        parts = [[*header, *part, *[0] * (room - len(part))] for part in (counts or [[]] * ranks.size)]
        sent = torch.tensor(parts, dtype=torch.int32, device=device)
        self._received = torch.empty_like(sent)
        place = Place(call.layer, call.backward, 0, call.num_chunks, "counts")
        ones = [1] * ranks.size
        self._message = exchange_rows(
            self._received, sent, received=ones, sent=ones, ranks=ranks, place=place, timeout_s=timeout_s
        )

    def counts(self) -> tuple[tuple[int, ...], ...]:
        """Wait for the message and compare.

        Returns:
            Source rank -> local expert here -> rows.

        Raises:
            RankError: If a rank is about to do something else; every rank raises it.

        Source: not in the paper.
        """
        self._message.wait()
        received = self._messages = self._received.tolist()
        own, names = self._call.numbers(), [field.name for field in fields(self._call)]
        for rank, message in enumerate(received):
            different = [i for i, name in enumerate(names) if message[i] != own[i]]
            if different:
                raise RankError(self._disagreement(rank, [(names[i], own[i], message[i]) for i in different]))
        start = len(own) + NUM_NOTES
        return tuple(tuple(message[start : start + self._num_counts]) for message in received)

    def notes(self) -> list[list[int]]:
        """What every rank told, after `counts`; not in the paper."""
        start = len(fields(self._call))
        return [message[start : start + NUM_NOTES] for message in self._messages]

    def _disagreement(self, other: int, different: list[tuple[str, int, int]]) -> str:
        call, ranks = self._call, self._ranks
        texts = {field.name for field in fields(call) if isinstance(getattr(call, field.name), str)}
        details = ", ".join(
            f"{name}={getattr(call, name)!r} here and another there"
            if name in texts
            else f"{name}={int(getattr(call, name))} here and {theirs} there"
            for name, _, theirs in different
        )
        direction = "backward" if call.backward else "forward"
        return (
            f"rank {ranks.rank} of {ranks.size}, layer {call.layer!r}, {direction}, chunk 1 of {call.num_chunks}, "
            f"stage counts: rank {other} calls with something else: {details}; every rank must call the same layers in "
            "the same order with the same settings (the number of tokens may differ)"
        )


def _failure(ranks: ExpertRanks, place: Place, waited_s: float, timeout_s: float, error: RuntimeError) -> RankError:
    others = [rank for rank in range(ranks.size) if rank != ranks.rank]
    what = (
        f"no answer from all of ranks {others} within {timeout_s:g} s; one of them is stuck, stopped or elsewhere in "
        "its program"
        if waited_s >= timeout_s
        else f"the exchange with ranks {others} broke off after {waited_s:.1f} s; one of them has ended"
    )
    return RankError(f"rank {ranks.rank} of {ranks.size}, {place}: {what} ({error})")


def _number(value: object) -> int:
    return zlib.crc32(value.encode()) & 0x7FFFFFFF if isinstance(value, str) else int(value)  # type: ignore[call-overload]
