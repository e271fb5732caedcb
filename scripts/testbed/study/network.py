"""The layers that are trained, on top of frozen ones, and the head.

B: texts, S: padded length, M: width, C: classes
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from scripts.testbed.data import Data
from scripts.testbed.study.examples import Encoded
from scripts.testbed.tasks.task import IGNORED, pad

LONGEST_ANSWER = 30  # tokens
UNANSWERABLE = frozenset({"squad_v2"})
"""Sets with questions that their context does not answer."""


class UpperNetwork(nn.Module):
    """Encoder layers and a head: a class or a number from the mean over tokens, or classes of every token.

    Args:
        layers: Layers of the library, called with hidden states and an additive mask.
        task: The kind of data set.
        width: M.
        num_labels: Classes, where there are any.
        dropout: Before the head.
    """

    def __init__(self, layers: Sequence[nn.Module], task: str, *, width: int, num_labels: int, dropout: float) -> None:
        super().__init__()
        self.layers, self.task = nn.ModuleList(layers), task
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, {"regression": 1, "question_answering": 2}.get(task, num_labels))
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, h_BSM: Tensor, mask_BS: Tensor) -> Tensor:
        """Logits of (B, C), or of (B, S, C) where every token has its own.

        Args:
            h_BSM: Outputs of the frozen layers.
            mask_BS: bool, False for padding.
        """
        additive_B11S = torch.zeros(mask_BS.shape, dtype=h_BSM.dtype).masked_fill(
            ~mask_BS, torch.finfo(h_BSM.dtype).min
        )[:, None, None]
        for layer in self.layers:
            h_BSM = layer(h_BSM, attention_mask=additive_B11S)
        if self.task in ("classification", "regression"):
            weight_BS1 = mask_BS[:, :, None].to(h_BSM.dtype)
            h_BSM = (h_BSM * weight_BS1).sum(1) / weight_BS1.sum(1)
        return self.head(self.dropout(h_BSM)).float()

    def loss(self, logits: Tensor, mask_BS: Tensor, examples: Sequence[Encoded]) -> Tensor:
        """The task's loss of a batch."""
        if self.task == "regression":
            return functional.mse_loss(logits[:, 0], torch.tensor([float(example.target) for example in examples]))
        if self.task == "classification":
            return functional.cross_entropy(logits, torch.tensor([example.target for example in examples]))
        if self.task == "tagging":
            target_BS = pad([example.target for example in examples], IGNORED)
            return functional.cross_entropy(logits.flatten(0, 1), target_BS.flatten(), ignore_index=IGNORED)
        span_B2 = torch.tensor([example.target for example in examples])
        logits = logits.masked_fill(~mask_BS[:, :, None], torch.finfo(logits.dtype).min)
        return (
            functional.cross_entropy(logits[:, :, 0], span_B2[:, 0])
            + functional.cross_entropy(logits[:, :, 1], span_B2[:, 1])
        ) / 2

    def predictions(self, logits: Tensor, examples: Sequence[Encoded], data: Data) -> list[Any]:
        """What is scored, one an example: a number, a class, the words' tags, or the answer's text."""
        if self.task == "regression":
            return logits[:, 0].tolist()
        if self.task == "classification":
            return logits.argmax(1).tolist()
        if self.task == "tagging":
            return [
                _tags(row.argmax(1).tolist(), example, data.label_names)
                for row, example in zip(logits, examples, strict=True)
            ]
        may_be_empty = data.name in UNANSWERABLE
        return [_answer(row, example, may_be_empty=may_be_empty) for row, example in zip(logits, examples, strict=True)]


def _tags(predicted: Sequence[int], example: Encoded, names: Sequence[str]) -> list[str]:
    tags = [names[tag] for tag, own in zip(predicted, example.target, strict=False) if own != IGNORED]
    return tags + ["O"] * (len(example.answer) - len(tags))


def _answer(logits_S2: Tensor, example: Encoded, *, may_be_empty: bool) -> str:
    """The likeliest span of the context, no longer than the longest answer; nothing, where token 0 is likelier."""
    inside = torch.tensor([low < high for low, high in example.spans])
    length = len(inside)
    start_S, end_S = (logits_S2[:length, side].masked_fill(~inside, -torch.inf) for side in (0, 1))
    score_SS = start_S[:, None] + end_S
    allowed_SS = torch.ones(length, length, dtype=torch.bool).triu().tril(LONGEST_ANSWER - 1)
    score_SS = score_SS.masked_fill(~allowed_SS, -torch.inf)
    first, last = divmod(int(score_SS.argmax()), length)
    if may_be_empty and logits_S2[0].sum() > score_SS[first, last]:
        return ""
    return example.context[example.spans[first][0] : example.spans[last][1]]
