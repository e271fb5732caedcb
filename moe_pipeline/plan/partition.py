"""Partition: which rows of which expert travel in which chunk.

Every expert's rows are cut into as many slices as there are chunks, so each chunk is a smaller layer call of the same
shape and all ranks know every chunk's sizes from one exchange of counts.
"""

from dataclasses import dataclass

from moe_pipeline.config import Split


@dataclass(frozen=True)
class Slice:
    """Rows `start` up to `stop` of those one rank sends to one expert.

    Source: our definition.
    """

    start: int
    stop: int

    @property
    def rows(self) -> int:
        """Number of rows; not in the paper."""
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class Partition:
    """Rows of every chunk on one rank, sent and received.

    Source: MPipeMoE (arXiv:2506.22175) section III-B and figure 5 (tokens); FasterMoE's split by ranks as described
    there. Slicing each expert's own rows, rather than the batch, is our definition.
    """

    sent: tuple[tuple[tuple[Slice, ...], ...], ...]
    """Chunk -> destination rank -> local expert there -> its slice of this rank's rows for it."""
    received: tuple[tuple[tuple[int, ...], ...], ...]
    """Chunk -> source rank -> local expert here -> rows."""

    @property
    def num_chunks(self) -> int:
        """Number of chunks; not in the paper."""
        return len(self.sent)

    @property
    def num_experts(self) -> int:
        """Experts on this rank; not in the paper."""
        return len(self.sent[0][0])

    def sent_rows(self, chunk: int) -> list[int]:
        """Rows of one chunk for each rank.

        Source: not in the paper.
        """
        return [sum(part.rows for part in experts) for experts in self.sent[chunk]]

    def received_rows(self, chunk: int) -> list[int]:
        """Rows of one chunk from each rank.

        Source: not in the paper.
        """
        return [sum(experts) for experts in self.received[chunk]]

    def expert_rows(self, chunk: int) -> tuple[int, ...]:
        """Rows of one chunk for each expert here.

        Source: not in the paper.
        """
        return tuple(map(sum, zip(*self.received[chunk], strict=True)))

    @property
    def max_sent_rows(self) -> int:
        """Rows of the largest chunk sent; not in the paper."""
        return max(sum(self.sent_rows(chunk)) for chunk in range(self.num_chunks))

    @property
    def max_received_rows(self) -> int:
        """Rows of the largest chunk received; not in the paper."""
        return max(sum(self.received_rows(chunk)) for chunk in range(self.num_chunks))


def partition(
    sent_counts: tuple[tuple[int, ...], ...],
    received_counts: tuple[tuple[int, ...], ...],
    *,
    num_chunks: int,
    split: Split = "tokens",
    rank: int = 0,
) -> Partition:
    """Cut the rows that ranks exchange into chunks.

    Args:
        sent_counts: Destination rank -> local expert there -> rows this rank sends to it.
        received_counts: Source rank -> local expert here -> rows.
        num_chunks: n; with split="ranks" it must be the number of ranks.
        split: What a chunk is; see `PipelineConfig.split`.
        rank: This rank.

    Returns:
        The partition; sender and receiver cut the same count in the same way.

    Raises:
        ValueError: If split="ranks" and there are not as many chunks as ranks.

    Source: MPipeMoE (arXiv:2506.22175) section III-B for tokens; its description of FasterMoE for ranks; local is ours.
    """
    num_ranks = len(sent_counts)
    if split == "ranks" and num_chunks != num_ranks:
        raise ValueError(
            f"num_chunks: got {num_chunks} with split='ranks'; accepted is the number of ranks, {num_ranks}"
        )
    cut = {"tokens": _by_tokens, "local": _local_first_and_last, "ranks": _by_ranks}[split]
    chunks = range(num_chunks)
    return Partition(
        sent=tuple(
            tuple(
                tuple(
                    cut(count, chunk, num_chunks, (other - rank) % num_ranks, num_ranks, turn=expert)
                    for expert, count in enumerate(counts)
                )
                for other, counts in enumerate(sent_counts)
            )
            for chunk in chunks
        ),
        received=tuple(
            tuple(
                tuple(
                    cut(count, chunk, num_chunks, (rank - other) % num_ranks, num_ranks, turn=expert).rows
                    for expert, count in enumerate(counts)
                )
                for other, counts in enumerate(received_counts)
            )
            for chunk in chunks
        ),
    )


def _by_tokens(count: int, chunk: int, num_chunks: int, distance: int, num_ranks: int, *, turn: int) -> Slice:
    """A slice of what one rank sends to one expert, `distance` ranks further on.

    Slices that are a row longer than others are dealt in turn to all chunks, over ranks and experts.
    """
    offset = (distance + turn) % num_chunks
    return Slice((count * chunk + offset) // num_chunks, (count * (chunk + 1) + offset) // num_chunks)


def _by_ranks(count: int, chunk: int, num_chunks: int, distance: int, num_ranks: int, *, turn: int) -> Slice:
    return Slice(0, count if chunk == distance else 0)


def _local_first_and_last(
    count: int, chunk: int, num_chunks: int, distance: int, num_ranks: int, *, turn: int
) -> Slice:
    """Rows that stay here need no message: one half is computed under the first message, the other under the last."""
    if num_ranks == 1 or num_chunks == 1:
        return _by_tokens(count, chunk, num_chunks, distance, num_ranks, turn=turn)
    last = num_chunks - 1 if num_chunks > 2 else num_chunks  # with two chunks nothing local is left for the end
    if distance > 0:
        inside = 1 <= chunk < last
        return _by_tokens(count, chunk - 1, last - 1, distance, num_ranks, turn=turn) if inside else Slice(0, 0)
    half = count - count // 2 if num_chunks > 2 else count
    return Slice(0, half) if chunk == 0 else Slice(half, count) if chunk == last else Slice(count, count)
