"""What rivals do to tokens: cut some (their embedding becomes zero) or replace some, on either side.

B  sentence
S  slot of a side, the source or the decoder's input
M  width of the embedding
V  id of the vocabulary
R  replaced slot

Numbers are drawn per ordinary token of the sentence, as in the generator, so that padding does not change them.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bliss.config import RivalConfig
from bliss.generator import similar_ids
from bliss.noise import NUM_BITS, random_bits
from bliss.vocabulary import Vocabulary

Side = Literal["source", "target"]
FIRST_STREAM = {"source": 3, "target": 7}  # the generator has 0 to 2
CHOICE, TOKEN, COUNT, DIRECTION = range(4)


@dataclass(frozen=True, kw_only=True, eq=False)
class Draw:
    """What a batch's random numbers depend on, and nothing else.

    Source: not in the paper.
    """

    sentence_id_B: Tensor
    """integers (B,): which sentence of the data set each row is."""

    epoch: int
    """Pass over the data."""

    seed: int
    """Seed of the run."""

    step: int | None = None
    """Optimizer steps taken so far; needed with `ramp_steps`."""

    def bits(self, counter_BS: Tensor, side: Side, use: int) -> Tensor:
        """Return uniform 32-bit numbers, int64 like `counter_BS`, for one use on one side (not in the paper)."""
        stream = FIRST_STREAM[side] + use
        return random_bits(self.sentence_id_B, counter_BS, seed=self.seed, epoch=self.epoch, stream=stream)


@dataclass(frozen=True, kw_only=True, eq=False)
class Corrupted:
    """One side of a batch after a rival has been at it (not in the paper)."""

    ids_BS: Tensor
    """int64: the ids, some of them replaced."""

    kept_BS: Tensor | None = None
    """bool: False where the embedding becomes zero; None where nothing is cut."""

    def cut(self, embedded_BSM: Tensor) -> Tensor:
        """Return the embedded side with zeros where tokens are cut (not in the paper)."""
        return embedded_BSM if self.kept_BS is None else embedded_BSM * self.kept_BS[..., None].to(embedded_BSM.dtype)


@torch.no_grad()
def corrupt(
    ids_BS: Tensor,
    real_BS: Tensor,
    *,
    side: Side,
    config: RivalConfig,
    draw: Draw,
    vocabulary: Vocabulary,
    embedding_VM: Tensor | None = None,
) -> Corrupted:
    """Cut or replace tokens of one side as a rival does; special tokens and padding never.

    Args:
        ids_BS: int64 (B, S), the source or the decoder's input.
        real_BS: (B, S), 0 for padding.
        side: Which of the two it is; each has random numbers of its own.
        config: kind, rate, ramp_steps and temperature are read.
        draw: What the random numbers depend on.
        vocabulary: Which ids of this side are special.
        embedding_VM: (V, M), this side's embedding; needed by rep_sim.

    Returns:
        The corrupted side; as it was for kinds that corrupt nothing.

    Raises:
        ValueError: The step is missing for a ramp, or the embedding for rep_sim.

    Source: word dropout, Rep(Uni), Rep(Sim): arXiv:2104.01853; SwitchOut: arXiv:1808.07512; Token Cutoff:
    arXiv:2009.13818; SimCut: arXiv:2206.02368.
    """
    if config.kind in ("r_drop", "vat"):
        return Corrupted(ids_BS=ids_BS)
    ordinary_BS = (real_BS != 0) & ~vocabulary.special_V[ids_BS]
    number_BS = ordinary_BS.cumsum(1)
    if config.kind == "switchout":
        share_B1 = switched_share(ordinary_BS.sum(1, keepdim=True), draw, side, config.temperature)
    else:
        share_B1 = torch.full((len(ids_BS), 1), corruption_rate(config, step=draw.step), dtype=torch.float64)
    threshold_B1 = (share_B1 * (1 << NUM_BITS)).long().to(ids_BS.device)
    chosen_BS = ordinary_BS & (draw.bits(number_BS, side, CHOICE) < threshold_B1)
    if config.kind in ("word_dropout", "token_cutoff", "simcut"):
        return Corrupted(ids_BS=ids_BS, kept_BS=~chosen_BS)
    bits_R = draw.bits(number_BS, side, TOKEN)[chosen_BS]
    if config.kind == "rep_sim":
        drawn_R = similar_ids(ids_BS[chosen_BS], bits_R, vocabulary, embedding_VM)
    else:
        drawn_R = vocabulary.drawable_N[(bits_R * len(vocabulary.drawable_N)) >> NUM_BITS]
    return Corrupted(ids_BS=ids_BS.masked_scatter(chosen_BS, drawn_R))


def corruption_rate(config: RivalConfig, *, step: int | None) -> float:
    """Return the probability that a token is cut or replaced at this step.

    Args:
        config: rate and ramp_steps are read.
        step: Optimizer steps taken so far; may be None without `ramp_steps`.

    Returns:
        1 - max(1 - rate, v / (v + exp(step / v))).

    Raises:
        ValueError: `step` is missing or negative while the config asks for a ramp.

    Source: arXiv:2104.01853, which keeps more tokens early.
    """
    if config.ramp_steps is None:
        return config.rate
    if step is None or step < 0:
        raise ValueError(f"step is {step}; with ramp_steps={config.ramp_steps} pass the optimizer steps taken so far")
    return min(config.rate, 1.0 / (1.0 + config.ramp_steps * math.exp(-step / config.ramp_steps)))


def switched_share(length_B1: Tensor, draw: Draw, side: Side, temperature: float) -> Tensor:
    """Return the share of each sentence's tokens that SwitchOut replaces, float64 (B, 1).

    A count n from 0 to the length is drawn in proportion to exp(-n / temperature), by the inverse of its distribution.

    Args:
        length_B1: int64 (B, 1), ordinary tokens of each sentence.
        draw: What the random numbers depend on.
        side: Source or target.
        temperature: In tokens.

    Source: SwitchOut (arXiv:1808.07512), section 3.
    """
    uniform_B1 = draw.bits(torch.zeros_like(length_B1), side, COUNT).double() / (1 << NUM_BITS)
    mass_B1 = -torch.expm1(-(length_B1 + 1).double() / temperature)
    count_B1 = (-temperature * torch.log1p(-uniform_B1 * mass_B1)).floor()
    return torch.minimum(count_B1, length_B1.double()) / length_B1.clamp(min=1)
