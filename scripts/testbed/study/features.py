"""Outputs of the frozen lower layers, computed once for a data set and read by every run on it.

Where they would take more memory than they may, each batch's are computed when it is read.

B: texts, S: padded length, M: width, T: tokens of all texts
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
    h_TM: Tensor | None
    """Every example's tokens, one example after another, in float32; None where they are computed when read."""
    starts: Sequence[int]
    """Where each example begins."""
    outputs: Callable[[Sequence[Encoded]], Tensor]
    """Padded outputs (B, S, M) of some examples."""

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
        h_BSM = self.outputs(examples) if self.h_TM is None else self.h_TM[place_BS.clamp(min=0)]
        return h_BSM, place_BS >= 0, examples

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


def compute(encoder: nn.Module, examples: Sequence[Encoded], *, pad_id: int, bf16: bool, max_bytes: float) -> Features:
    """Run the frozen layers, without dropout.

    Args:
        encoder: A model of the library that ends with the last frozen layer; it must stay as it is.
        examples: What it reads.
        pad_id: The tokenizer's padding.
        bf16: Whether under autocast.
        max_bytes: Most memory for the outputs; where they need more, they are computed batch by batch, every time.
    """
    encoder.eval()
    lengths = [len(example.inputs["input_ids"]) for example in examples]
    starts = [0, *accumulate(lengths[:-1])]
    outputs = partial(_outputs, encoder, pad_id=pad_id, bf16=bf16)
    features = Features(examples=examples, h_TM=None, starts=starts, outputs=outputs)
    width = outputs(examples[:1]).shape[2]  # a split without rows is refused before
    if sum(lengths) * width * torch.float32.itemsize > max_bytes:
        return features
    h_TM = torch.empty(sum(lengths), width)
    for rows in features.by_length(BATCH_TOKENS):
        h_BSM = outputs([examples[row] for row in rows])
        for row, h_SM in zip(rows, h_BSM, strict=True):
            h_TM[starts[row] : starts[row] + lengths[row]] = h_SM[: lengths[row]]
    return Features(examples=examples, h_TM=h_TM, starts=starts, outputs=outputs)


@torch.no_grad()
def _outputs(encoder: nn.Module, examples: Sequence[Encoded], *, pad_id: int, bf16: bool) -> Tensor:
    inputs = {
        name: pad([example.inputs[name] for example in examples], pad_id if name == "input_ids" else 0)
        for name in examples[0].inputs
    }
    mask_BS = pad([[1] * len(example.inputs["input_ids"]) for example in examples], 0)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        h_BSM: Tensor = encoder(**inputs, attention_mask=mask_BS).last_hidden_state.float()
    return h_BSM
