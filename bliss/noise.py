"""Random bits as a pure function of what they are for, so that noise does not depend on who draws it.

A 32-bit integer hash over (seed, epoch, stream, sentence, counter), computed in int64: both factors of every product
stay below 2**32 and 2**31, so nothing overflows and every device gives the same bits.

B  sentence
S  slot of the source
"""

from typing import TypeVar

import torch
from torch import Tensor

NUM_BITS = 32
_MASK = (1 << NUM_BITS) - 1
_GOLDEN = 0x9E3779B9

Word = TypeVar("Word", int, Tensor)


def _mix(word: Word) -> Word:
    word = word ^ (word >> 15)
    word = (word * 0x2C1B3C6D) & _MASK
    word = word ^ (word >> 12)
    word = (word * 0x297A2D39) & _MASK
    return word ^ (word >> 15)


def _absorb(state: Word, word: Word) -> Word:
    return _mix((((word & _MASK) ^ state) + _GOLDEN) & _MASK)


def random_bits(sentence_id_B: Tensor, counter_BS: Tensor, *, seed: int, epoch: int, stream: int) -> Tensor:
    """Draw a uniform 32-bit number for every counter of every sentence.

    Args:
        sentence_id_B: integers (B,), which sentence of the data set each row is.
        counter_BS: int64 (B, S), which number of the sentence is wanted.
        seed: Seed of the run.
        epoch: Pass over the data; each has noise of its own.
        stream: Use of the numbers; each has numbers of its own.

    Returns:
        int64 (B, S), uniform in [0, 2**32).

    Source: not in the paper; its generator's random numbers are unknown.
    """
    state = 0
    for word in (seed, seed >> NUM_BITS, epoch, stream):
        state = _absorb(state, word)
    sentence_id_B = sentence_id_B.to(torch.int64)
    state_B = torch.full_like(sentence_id_B, state)
    for word_B in (sentence_id_B, sentence_id_B >> NUM_BITS):
        state_B = _absorb(state_B, word_B)
    return _absorb(state_B[:, None], counter_BS)
