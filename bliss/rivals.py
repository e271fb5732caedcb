"""The rivals' losses, each in the place of L_seq: augmentations read a corrupted pair, the others compare two passes.

| kind | passes | cross entropy | divergence, times alpha | paper |
| --- | --- | --- | --- | --- |
| word_dropout, rep_uni, rep_sim | 1 | corrupted | - | arXiv:2104.01853 |
| switchout | 1 | corrupted | - | arXiv:1808.07512 |
| token_cutoff | 2 | mean of clean and cut | half the Jensen-Shannon of the two | arXiv:2009.13818 |
| r_drop | 2 | mean of two dropout masks | a quarter of KL in both directions | arXiv:2106.14448 |
| simcut | 2 | clean | KL from clean to cut, with gradients through both | arXiv:2206.02368 |
| vat | 3 | clean | KL from clean (fixed) to the worst small noise on embeddings | arXiv:1704.03976 |

Where a paper adds two cross entropies, all its terms are halved here: L_seq stays a mean, alpha is the paper's.

B  sentence
S  slot of the source
T  slot of the target
M  width of the encoder
E  width of an embedding
V  id of the vocabulary
N  target token that counts
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 -- the name everyone uses

from bliss.config import AUGMENTATIONS, RivalConfig
from bliss.corruption import DIRECTION, Corrupted, Draw, Side, corrupt
from bliss.losses import IGNORED_LABEL, sequence_loss
from bliss.network import EncoderDecoder, decode_target, encode_source
from bliss.noise import NUM_BITS
from bliss.vocabulary import Vocabulary

VAT_PROBE = 1e-2  # length of the first, random noise over that of the embeddings: small, yet above bfloat16's rounding


@dataclass(frozen=True, kw_only=True, eq=False)
class Rival:
    """A rival and all that its noise on a batch depends on.

    Source: not in the paper.
    """

    config: RivalConfig
    """Which method."""

    draw: Draw
    """What the random numbers of this batch depend on."""

    vocabulary: Vocabulary
    """Special ids of the source, and of the target where it has no vocabulary of its own."""

    target_vocabulary: Vocabulary | None = None
    """Special ids of the target; None where both sides share one tokenizer."""


Changes = tuple[Tensor, Tensor]
"""Noise added to the embedded source (B, S, E) and to the embedded decoder input (B, T, E)."""


def rival_loss(
    network: EncoderDecoder,
    rival: Rival,
    *,
    input_ids_BS: Tensor,
    attention_mask_BS: Tensor,
    labels_BT: Tensor,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a rival's loss on one batch.

    Args:
        network: The encoder-decoder network.
        rival: The method, and what its noise depends on.
        input_ids_BS: int64 (B, S), the source.
        attention_mask_BS: (B, S), 0 for padding.
        labels_BT: int64 (B, T), the target; -100 is ignored.
        label_smoothing: Probability mass that each cross entropy spreads over the vocabulary.

    Returns:
        The loss, 0-d; the first pass's logits, (B, T, V); the first pass's encoder states, (B, S, M).

    Raises:
        ValueError: A ramp lacks the step, or rep_sim an embedding of its vocabulary.

    Source: the table of this module.
    """
    passes = _Passes(network, rival, input_ids_BS, attention_mask_BS, labels_BT, label_smoothing)
    kind, alpha = rival.config.kind, rival.config.weight
    if kind in AUGMENTATIONS:
        return passes.run(*passes.corrupted())
    loss, logits_BTV, states_BSM = passes.run()
    if kind == "vat":
        noise = passes.adversarial(logits_BTV)
        _, noisy_BTV, _ = passes.run(noise=noise)
        divergence = kl(logits_BTV.detach(), noisy_BTV, labels_BT)
        return loss + alpha * divergence, logits_BTV, states_BSM
    second, second_BTV, _ = passes.run(*passes.corrupted())
    if kind == "simcut":
        return loss + alpha * kl(logits_BTV, second_BTV, labels_BT), logits_BTV, states_BSM
    distance = jensen_shannon if kind == "token_cutoff" else symmetric_kl
    divergence = distance(logits_BTV, second_BTV, labels_BT)
    return (loss + second + alpha * divergence) / 2, logits_BTV, states_BSM


@dataclass(frozen=True, eq=False)
class _Passes:
    """The passes of one batch through a network."""

    network: EncoderDecoder
    rival: Rival
    input_ids_BS: Tensor
    attention_mask_BS: Tensor
    labels_BT: Tensor
    label_smoothing: float

    def decoder_inputs(self) -> tuple[Tensor, Tensor]:
        """The target moved right by one, and which of its slots predict a token that counts."""
        ids_BT = self.network.prepare_decoder_input_ids_from_labels(self.labels_BT)
        return ids_BT, self.labels_BT != IGNORED_LABEL

    def corrupted(self) -> tuple[Corrupted, Corrupted]:
        """Both sides as the rival corrupts them."""
        rival, ids_BT = self.rival, self.decoder_inputs()
        sides: tuple[tuple[Side, Tensor, Tensor, Vocabulary, Tensor | None], ...] = (
            ("source", self.input_ids_BS, self.attention_mask_BS, rival.vocabulary, self._embedding("source")),
            ("target", *ids_BT, rival.target_vocabulary or rival.vocabulary, self._embedding("target")),
        )
        source, target = (
            corrupt(
                ids,
                real,
                side=side,
                config=rival.config,
                draw=rival.draw,
                vocabulary=vocabulary,
                embedding_VM=embedding,
            )
            for side, ids, real, vocabulary, embedding in sides
        )
        return source, target

    def run(
        self, source: Corrupted | None = None, target: Corrupted | None = None, *, noise: Changes | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cross entropy, logits and encoder states of one pass, on either side as it is or corrupted, with noise."""
        source = source or Corrupted(ids_BS=self.input_ids_BS)
        target = target or Corrupted(ids_BS=self.decoder_inputs()[0])
        source_change = source.cut if noise is None else noise[0].add
        target_change = target.cut if noise is None else noise[1].add
        states_BSM = encode_source(self.network, source.ids_BS, self.attention_mask_BS, source_change).last_hidden_state
        logits_BTV = decode_target(self.network, states_BSM, self.attention_mask_BS, target.ids_BS, target_change)
        loss = sequence_loss(logits_BTV, self.labels_BT, label_smoothing=self.label_smoothing)
        return loss, logits_BTV, states_BSM

    def adversarial(self, logits_BTV: Tensor) -> Changes:
        """The noise that moves the prediction most, by one step of power iteration from a random direction."""
        ids_BT, real_BT = self.decoder_inputs()
        source = self._length_and_direction("source", self.input_ids_BS, self.attention_mask_BS != 0)
        target = self._length_and_direction("target", ids_BT, real_BT)
        probe = [(VAT_PROBE * length_B11 * direction).requires_grad_() for length_B11, direction in (source, target)]
        _, noisy_BTV, _ = self.run(noise=(probe[0], probe[1]))
        gradients = torch.autograd.grad(kl(logits_BTV.detach(), noisy_BTV, self.labels_BT), probe)
        radius = self.rival.config.radius
        lengths = (source[0], target[0])
        noise = [radius * length * _unit(gradient) for length, gradient in zip(lengths, gradients, strict=True)]
        return noise[0], noise[1]

    @torch.no_grad()
    def _length_and_direction(self, side: Side, ids_BS: Tensor, real_BS: Tensor) -> tuple[Tensor, Tensor]:
        """Length of each sentence's embeddings, and a random direction of length 1, both without padding."""
        real_BS1 = real_BS[..., None]
        embedded_BSE = self._embeddings(side)(ids_BS) * real_BS1
        width = embedded_BSE.shape[-1]
        counter_BSE = (real_BS1.long().cumsum(1) - 1) * width + torch.arange(width, device=ids_BS.device)
        bits = self.rival.draw.bits(counter_BSE.flatten(1), side, DIRECTION).view_as(counter_BSE)
        direction_BSE = (bits.float() / (1 << NUM_BITS - 1) - 1) * real_BS1
        return embedded_BSE.float().norm(dim=(1, 2), keepdim=True), _unit(direction_BSE)

    def _embeddings(self, side: Side) -> nn.Module:
        return (self.network.get_encoder() if side == "source" else self.network.get_decoder()).get_input_embeddings()

    def _embedding(self, side: Side) -> Tensor | None:
        if self.rival.config.kind != "rep_sim":
            return None
        weight = self._embeddings(side).weight
        assert isinstance(weight, Tensor)
        return weight


def kl(from_BTV: Tensor, to_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Return KL(softmax(from) || softmax(to)) per target token, with gradients through both.

    Args:
        from_BTV: (B, T, V), logits.
        to_BTV: (B, T, V), logits.
        labels_BT: int64 (B, T); tokens at -100 do not count.

    Returns:
        The mean, 0-d; 0 where no token counts.

    Source: not in the paper.
    """
    from_NV, to_NV, count = _log_probabilities(from_BTV, to_BTV, labels_BT)
    return F.kl_div(to_NV, from_NV, reduction="sum", log_target=True) / count


def symmetric_kl(first_BTV: Tensor, second_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Return the mean of both directions' KL per target token, 0-d.

    Source: R-Drop (arXiv:2106.14448), equation 2.
    """
    first_NV, second_NV, count = _log_probabilities(first_BTV, second_BTV, labels_BT)
    # KL(p || q) + KL(q || p) is the sum of (p - q)(log p - log q): one pass over the vocabulary instead of two.
    return ((first_NV.exp() - second_NV.exp()) * (first_NV - second_NV)).sum() / (2 * count)


def jensen_shannon(first_BTV: Tensor, second_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Return the mean KL to the mean of both distributions per target token, 0-d.

    Source: Cutoff (arXiv:2009.13818), section 3.2.
    """
    first_NV, second_NV, count = _log_probabilities(first_BTV, second_BTV, labels_BT)
    middle_NV = torch.logaddexp(first_NV, second_NV) - torch.log(torch.tensor(2.0))
    both = [F.kl_div(middle_NV, own_NV, reduction="sum", log_target=True) for own_NV in (first_NV, second_NV)]
    return (both[0] + both[1]) / (2 * count)


def _log_probabilities(first_BTV: Tensor, second_BTV: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    counts_BT = labels_BT != IGNORED_LABEL
    first_NV, second_NV = (logits[counts_BT].float().log_softmax(-1) for logits in (first_BTV, second_BTV))
    return first_NV, second_NV, counts_BT.sum().clamp(min=1)


def _unit(noise_BSE: Tensor) -> Tensor:
    """Of length 1 in each sentence; 0 where it has no length."""
    noise_BSE = noise_BSE.float()
    return noise_BSE / noise_BSE.norm(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
