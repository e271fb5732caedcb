"""Which ids begin a word, and which are special: all that the generator knows of a tokenizer.

V  id of the vocabulary
N  id that may be drawn as a replacement
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

METASPACE, BYTE_LEVEL_SPACE, WORDPIECE = "\u2581", "\u0120", "##"


@dataclass(frozen=True, kw_only=True, eq=False)
class Vocabulary:
    """Word boundaries and special ids of a tokenizer, as tensors on one device.

    Source: our definition; words move and are replaced whole, and special tokens never.
    """

    starts_word_V: Tensor
    """bool: the token begins a new word."""

    special_V: Tensor
    """bool: the token never moves, is never replaced and never drawn (BOS, EOS, padding, language codes ...)."""

    drawable_N: Tensor = field(init=False)
    """int64: the ids that are not special, ascending."""

    def __post_init__(self) -> None:
        for name, value in (("starts_word_V", self.starts_word_V), ("special_V", self.special_V)):
            if value.dtype != torch.bool or value.ndim != 1:
                raise TypeError(
                    f"{name} is {value.dtype} of shape {tuple(value.shape)}; it must be a bool vector with one entry "
                    f"per id: build it with Vocabulary.from_tokens"
                )
        if self.starts_word_V.shape != self.special_V.shape:
            raise ValueError(
                f"special_V has {len(self.special_V)} entries and starts_word_V has {len(self.starts_word_V)}; "
                f"both need one per id: build them from the same list of tokens"
            )
        object.__setattr__(self, "drawable_N", (~self.special_V).nonzero().squeeze(1))
        if len(self.drawable_N) < 2:
            raise ValueError(
                f"special_V leaves {len(self.drawable_N)} ordinary ids; replacement needs at least 2: "
                f"mark only special tokens as special"
            )

    @classmethod
    def from_tokens(cls, tokens: Sequence[str], *, special_ids: Iterable[int]) -> "Vocabulary":
        """Read word boundaries off the tokens of a Metaspace, byte-level or WordPiece tokenizer.

        The marking that most tokens carry decides: a leading U+2581 (SentencePiece, Metaspace) or U+0120 (byte-level
        BPE) begins a word, and a leading ## (WordPiece) continues one.

        Args:
            tokens: The token of every id, e.g. `tokenizer.convert_ids_to_tokens(range(len(tokenizer)))`.
            special_ids: Ids of special tokens, e.g. `tokenizer.all_special_ids`.

        Returns:
            The vocabulary, on the CPU.

        Raises:
            ValueError: No token carries one of the markings, or a special id is not an index into `tokens`.

        Source: not in the paper.
        """
        marks = (METASPACE, BYTE_LEVEL_SPACE, WORDPIECE)
        counts = {mark: sum(token.startswith(mark) for token in tokens) for mark in marks}
        mark = max(marks, key=counts.__getitem__)
        if counts[mark] == 0:
            raise ValueError(
                f"tokens: none of the {len(tokens)} tokens begins with {', '.join(map(ascii, marks))}, so words cannot "
                f"be told apart: build Vocabulary(starts_word_V=..., special_V=...) from your tokenizer's own rule"
            )
        special_V = torch.zeros(len(tokens), dtype=torch.bool)
        for index in special_ids:
            if not 0 <= index < len(tokens):
                raise ValueError(f"special_ids has {index}; ids run from 0 to {len(tokens) - 1}: pass all tokens")
            special_V[index] = True
        starts_word_V = torch.tensor([token.startswith(mark) != (mark == WORDPIECE) for token in tokens])
        return cls(starts_word_V=starts_word_V, special_V=special_V)

    def to(self, device: torch.device | str) -> "Vocabulary":
        """Return the vocabulary on a device, itself where it is there already (not in the paper)."""
        if self.special_V.device == torch.device(device):
            return self
        return Vocabulary(starts_word_V=self.starts_word_V.to(device), special_V=self.special_V.to(device))
