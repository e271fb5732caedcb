"""Outputs of the frozen lower layers, computed once for a data set and read by every run on it.

B: texts, S: padded length, M: width, T: tokens of all texts
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from scripts.testbed.study.examples import Encoded
from scripts.testbed.tasks.task import pad

BATCH_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class Features:
    """Outputs for the examples of one split."""

    examples: Sequence[Encoded]
    h_TM: Tensor
    """Every example's tokens, one example after another, in float32."""
    starts: Sequence[int]
    """Where each example begins."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(example.inputs["input_ids"]) for example in self.examples]

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, list[Encoded]]:
        """Padded outputs (B, S, M), the mask (B, S) of real tokens, and the examples."""
        examples = [self.examples[row] for row in rows]
        places = [
            range(self.starts[row], self.starts[row] + len(example.inputs["input_ids"]))
            for row, example in zip(rows, examples, strict=True)
        ]
        place_BS = pad([list(place) for place in places], -1)
        return self.h_TM[place_BS.clamp(min=0)], place_BS >= 0, examples

    def by_length(self, batch_tokens: int) -> list[list[int]]:
        """Rows in batches of similar lengths, each of at most so many padded tokens, or of one row."""
        lengths = self.lengths
        batches: list[list[int]] = []
        for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
            if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= batch_tokens:
                batches[-1].append(row)
            else:
                batches.append([row])
        return batches


@torch.no_grad()
def compute(encoder: nn.Module, examples: Sequence[Encoded], *, pad_id: int, bf16: bool) -> Features:
    """Run the frozen layers, without dropout.

    Args:
        encoder: A model of the library that ends with the last frozen layer.
        examples: What it reads.
        pad_id: The tokenizer's padding.
        bf16: Whether under autocast.
    """
    encoder.eval()
    lengths = [len(example.inputs["input_ids"]) for example in examples]
    starts = [0, *accumulate(lengths[:-1])]
    empty = Features(examples=examples, h_TM=torch.empty(0), starts=starts)
    h_TM: Tensor | None = None
    for rows in empty.by_length(BATCH_TOKENS):
        inputs = {
            name: pad([examples[row].inputs[name] for row in rows], pad_id if name == "input_ids" else 0)
            for name in examples[rows[0]].inputs
        }
        mask_BS = pad([[1] * lengths[row] for row in rows], 0)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            h_BSM = encoder(**inputs, attention_mask=mask_BS).last_hidden_state.float()
        if h_TM is None:
            h_TM = torch.empty(sum(lengths), h_BSM.shape[2])
        for row, h_SM in zip(rows, h_BSM, strict=True):
            h_TM[starts[row] : starts[row] + lengths[row]] = h_SM[: lengths[row]]
    assert h_TM is not None, "a split without rows is refused before"
    return Features(examples=examples, h_TM=h_TM, starts=starts)
