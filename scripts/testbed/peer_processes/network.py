"""Whole networks that peers run: encoders with random weights, and a training step of one or of an encoder-decoder."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scripts.testbed.peer_processes.problem import DType, Problem


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network of the library, its sizes, and what is asked of it; without dropout."""

    kind: Literal["bert", "pegasus"]
    """An encoder, whose last hidden states are computed, or an encoder-decoder."""
    num_layers: int
    """Of the encoder, and of the decoder, too, where there is one."""
    width: int
    num_heads: int
    hidden: int
    """Of the feed-forward layers."""
    vocabulary: int
    batch: int
    length: int
    """Tokens of a sequence, of the target's, too, where there is one."""
    backward: bool = False
    """Whether a training step is taken: the loss and every gradient, without the optimizer, which all have alike."""
    dtype: DType = "fp32"
    seed: int = 0

    @property
    def flops(self) -> int:
        """Of the products, masked entries included; a backward does twice as many as a forward."""
        rows, width = self.batch * self.length, self.width
        scores = 2 * 2 * rows * self.length * width
        feed_forward = 2 * rows * 2 * width * self.hidden
        projections = 2 * rows * 4 * width * width
        encoder = self.num_layers * (projections + scores + feed_forward)
        decoder = self.num_layers * (2 * (projections + scores) + feed_forward) if self.kind == "pegasus" else 0
        head = 2 * rows * width * self.vocabulary if self.backward else 0
        return (encoder + decoder + head) * (3 if self.backward else 1)

    def tokens(self) -> NDArray[np.int64]:
        """Token ids, (batch, length); none is a special one."""
        return np.random.default_rng(self.seed).integers(4, self.vocabulary, (self.batch, self.length))

    def to_json(self) -> dict[str, Any]:
        """The fields."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        sizes = f"{self.num_layers} layers of {self.width}, {self.batch} x {self.length} tokens"
        return f"{self.kind}, {sizes}, {self.dtype}{', training step' * self.backward}"


def read(fields: Mapping[str, Any]) -> Problem | Network:
    """What the `to_json` of either gave.

    Args:
        fields: Name -> value.
    """
    return Problem(**fields) if fields["kind"] in ("chain", "attention") else Network(**fields)
