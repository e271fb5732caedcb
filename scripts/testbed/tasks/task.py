"""What a task gives to the trainer, and what it makes of the trained network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from scripts.testbed.batches import padded_length
from scripts.testbed.report import Section
from scripts.testbed.rows import Row

Example = dict[str, Any]
IGNORED = -100  # the library's label of positions that do not count


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Tokenized examples, each with `input_ids`, `labels` and `sentence_id`."""

    train: Sequence[Example]
    valid: Sequence[Example]
    test: Sequence[Example]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Figures of one network on the test split."""

    rows: tuple[Row, ...]
    summary: Mapping[str, float]
    sections: tuple[Section, ...] = ()


class Predictor(Protocol):
    """The part of the library's Trainer that a task evaluates with."""

    def predict(self, test_dataset: Any) -> Any: ...


class Task(Protocol):
    """A task: its data as tensors, its network, and its figures."""

    tokenizer: PreTrainedTokenizerFast
    splits: Splits
    data_sha256: str
    generates: bool
    """Whether prediction generates text."""

    def network(self) -> PreTrainedModel:
        """A fresh network, equal at every call."""
        ...

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Pad examples into a batch."""
        ...

    def evaluate(self, trainer: Predictor, provider: str) -> Evaluation:
        """Figures of the trainer's network on the test split, under the provider's name."""
        ...

    def baseline(self, name: str) -> Evaluation | None:
        """Figures of a baseline that trains no network; None where the name is not one of this task's."""
        ...


def pad(sequences: Sequence[Sequence[int]], value: int) -> Tensor:
    """Right-pad sequences with `value` to one of few lengths; int64 of shape (B, S)."""
    length = padded_length(max(map(len, sequences)))
    return torch.tensor([[*sequence, *[value] * (length - len(sequence))] for sequence in sequences])


def by_length(examples: Sequence[Example]) -> list[Example]:
    """Examples from the longest to the shortest, so that batches taken in order are padded little."""
    return sorted(examples, key=lambda example: -len(example["input_ids"]))
