"""Batches of similar lengths: few shapes, a fixed number of padded tokens, and an order that depends on the seed alone.

B: sentences of a batch, S: padded length
"""

import random
from collections.abc import Iterator, Sequence
from itertools import count, islice

from torch.utils.data import Dataset, Sampler

from configs.typed import ConfigError

PAD_MULTIPLE = 8  # every new batch shape costs the CPU's matrix library a rebuild; few lengths keep it rare


def padded_length(length: int) -> int:
    """The length a sequence is padded to: the next multiple of 8, and above 64 of 16."""
    multiple = PAD_MULTIPLE if length <= 64 else 2 * PAD_MULTIPLE
    return max(PAD_MULTIPLE, -(-length // multiple) * multiple)


class TokenBatches(Sampler[list[tuple[int, int]]]):
    """All batches of a run, in order, as lists of (epoch, row) pairs.

    The epoch travels with the row, so that whatever depends on it (a perturbation's noise) needs no state, and a
    resumed run that skips its first batches draws exactly the remaining ones.

    Args:
        lengths: Tokens of each row, on its longer side.
        batch_tokens: Padded tokens of a batch, at most, on the longer side.
        num_batches: Batches of this rank in the whole run, over as many epochs as they take.
        seed: Seed of the order, which is one for all ranks.
        rank: Which of the ranks this is; it draws every `num_ranks`-th batch.
        num_ranks: Ranks that share the data.

    Raises:
        ConfigError: Where there are no rows, or the longest does not fit a batch.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_tokens: int,
        num_batches: int,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        if not lengths:
            raise ConfigError("data.name: got a set without training examples, accepts one with at least one")
        longest = padded_length(max(lengths))
        if longest > batch_tokens:
            raise ConfigError(
                f"trainer.batch_tokens: got {batch_tokens}, accepts at least {longest}, the longest training example"
            )
        self._padded = [padded_length(length) for length in lengths]
        self._batch_tokens = batch_tokens
        self._num_batches = num_batches
        self._seed = seed
        self._rank, self._num_ranks = rank, num_ranks

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        yield from islice(self._all_ranks(), self._rank, self._num_batches * self._num_ranks, self._num_ranks)

    def _all_ranks(self) -> Iterator[list[tuple[int, int]]]:
        for epoch in count():
            for rows in self.epoch(epoch):
                yield [(epoch, row) for row in rows]

    def epoch(self, epoch: int) -> list[list[int]]:
        """The batches of one epoch: every row once, rows of one padded length together.

        What is left of a length when its last full batch is cut is padded with the next longer rows.
        """
        order = random.Random(f"{self._seed}/{epoch}")  # noqa: S311 (an order, not a secret)
        rows = list(range(len(self._padded)))
        order.shuffle(rows)
        rows.sort(key=lambda row: self._padded[row])  # stable: rows of one length stay shuffled
        batches: list[list[int]] = []
        current: list[int] = []
        for row in rows:
            if current and (len(current) + 1) * self._padded[row] > self._batch_tokens:
                batches.append(current)
                current = []
            current.append(row)
        batches.append(current)
        order.shuffle(batches)
        return batches


class EpochRows(Dataset[dict[str, object]]):
    """A dataset read by (epoch, row): the row's columns and the epoch it is read in."""

    def __init__(self, rows: Sequence[dict[str, object]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, object]:
        epoch, row = key
        return {**self._rows[row], "epoch": epoch}
