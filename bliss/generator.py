"""The generator: shuffles words locally and replaces some, without changing the length.

B  sentence
S  slot of the source
V  id of the vocabulary
N  id that may be drawn
M  width of the model
R  replaced slot

A word is a run of subwords; special tokens and padding are no words. Numbers are drawn per word and per subword of the
sentence, not per slot, so that neither the batch nor its padding (left or right) changes them.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- the name everyone uses

from bliss.config import BlissConfig
from bliss.noise import NUM_BITS, random_bits
from bliss.vocabulary import Vocabulary

SHUFFLE_STREAM, REPLACE_STREAM, TOKEN_STREAM = range(3)
SIMILARITY_TEMPERATURE = 0.1  # of cosines: sharp enough to favour neighbours, flat enough to reach many of them


@dataclass(frozen=True, kw_only=True, eq=False)
class Perturbed:
    """A perturbed batch and what was done to it.

    Source: our definition; source_slot is its pi.
    """

    input_ids_BS: Tensor
    """int64: the perturbed ids; the attention mask is the clean batch's."""

    source_slot_BS: Tensor
    """int64: perturbed slot j holds, or replaces, the token of the original slot source_slot[j]."""

    replaced_BS: Tensor
    """bool: perturbed slot j was replaced."""


@torch.no_grad()
def perturb(
    input_ids_BS: Tensor,
    attention_mask_BS: Tensor,
    *,
    sentence_id_B: Tensor,
    epoch: int,
    seed: int,
    vocabulary: Vocabulary,
    config: BlissConfig,
    step: int | None = None,
    embedding_VM: Tensor | None = None,
) -> Perturbed:
    """Shuffle words locally and replace some of them.

    Word w gets the score w + U(0, K) and words are sorted by it; each is replaced with probability gamma, every subword
    by an id of its own. Subwords of a word stay together and in order; special tokens and padding stay where they are,
    and no word crosses them. The same sentence, seed and epoch give the same noise in every batch, on every device.

    Args:
        input_ids_BS: int64 (B, S), the source.
        attention_mask_BS: (B, S), 0 for padding.
        sentence_id_B: integers (B,), which sentence of the data set each row is.
        epoch: Pass over the data.
        seed: Seed of the run.
        vocabulary: Word boundaries and special ids, on the batch's device.
        config: shuffle_range, replace_ratio, replace_by and ramp_steps are read.
        step: Optimizer steps taken so far; needed with `ramp_steps`.
        embedding_VM: (V, M), the source embedding; needed with replace_by="similar".

    Returns:
        The perturbed batch.

    Raises:
        ValueError: A shape, device or id does not fit, or an argument that the config needs is missing.

    Source: our definition; the shuffle is that of SimCut's and fairseq's WordShuffle, the similar replacement and the
    ramp are variants of Rep(Sim) and its schedule (arXiv:2104.01853).
    """
    _check_batch(input_ids_BS, attention_mask_BS, sentence_id_B, vocabulary)
    movable_BS = (attention_mask_BS != 0) & ~vocabulary.special_V[input_ids_BS]
    starts_BS = movable_BS & (vocabulary.starts_word_V[input_ids_BS] | ~_shift_right(movable_BS))
    word_BS = starts_BS.cumsum(1)

    bits_BS = random_bits(sentence_id_B, word_BS, seed=seed, epoch=epoch, stream=SHUFFLE_STREAM)
    source_slot_BS = _shuffled_slots(movable_BS, starts_BS, bits_BS, shuffle_range=config.shuffle_range)

    threshold = int(replacement_probability(config, step=step) * (1 << NUM_BITS))
    bits_BS = random_bits(sentence_id_B, word_BS, seed=seed, epoch=epoch, stream=REPLACE_STREAM)
    replaced_BS = movable_BS & (bits_BS < threshold)

    bits_BS = random_bits(sentence_id_B, movable_BS.cumsum(1), seed=seed, epoch=epoch, stream=TOKEN_STREAM)
    if config.replace_by == "uniform":
        drawn_BS = vocabulary.drawable_N[(bits_BS * len(vocabulary.drawable_N)) >> NUM_BITS]
        perturbed_BS = torch.where(replaced_BS, drawn_BS, input_ids_BS)
    else:
        drawn_R = similar_ids(input_ids_BS[replaced_BS], bits_BS[replaced_BS], vocabulary, embedding_VM)
        perturbed_BS = input_ids_BS.masked_scatter(replaced_BS, drawn_R)

    return Perturbed(
        input_ids_BS=perturbed_BS.gather(1, source_slot_BS),
        source_slot_BS=source_slot_BS,
        replaced_BS=replaced_BS.gather(1, source_slot_BS),
    )


def replacement_probability(config: BlissConfig, *, step: int | None) -> float:
    """Return the probability that a word is replaced at this step.

    With `ramp_steps` v it is 1 - max(1 - gamma, v / (v + exp(step / v))), which grows from 1 / (v + 1) to gamma.

    Args:
        config: replace_ratio and ramp_steps are read.
        step: Optimizer steps taken so far; may be None without `ramp_steps`.

    Returns:
        The probability.

    Raises:
        ValueError: `step` is missing or negative while the config asks for a ramp.

    Source: our definition, reading (c) of "smoothed"; the schedule of arXiv:2104.01853.
    """
    if config.ramp_steps is None:
        return config.replace_ratio
    if step is None or step < 0:
        raise ValueError(f"step is {step}; with ramp_steps={config.ramp_steps} pass the optimizer steps taken so far")
    return min(config.replace_ratio, 1.0 / (1.0 + config.ramp_steps * math.exp(-step / config.ramp_steps)))


def _shift_right(flags_BS: Tensor) -> Tensor:
    """Each slot's left neighbour; False before the first slot."""
    return F.pad(flags_BS, (1, 0))[:, : flags_BS.shape[1]]


def _shuffled_slots(movable_BS: Tensor, starts_BS: Tensor, bits_BS: Tensor, *, shuffle_range: int) -> Tensor:
    """Slots of the source in the order of their words' scores, in exact 32-bit fixed point.

    A slot that must not move lies K + 1 places after the word before it, farther than any score reaches.
    """
    place_BS = torch.where(movable_BS, starts_BS, shuffle_range + 1).cumsum(1)
    score_BS = (place_BS << NUM_BITS) + torch.where(movable_BS, bits_BS * shuffle_range, 0)
    return score_BS.argsort(dim=1, stable=True)


def similar_ids(original_R: Tensor, bits_R: Tensor, vocabulary: Vocabulary, embedding_VM: Tensor | None) -> Tensor:
    """Draw ids in proportion to exp(cosine / 0.1) of their embeddings, the original excluded.

    Args:
        original_R: int64 (R,), the ids to replace.
        bits_R: int64 (R,), uniform 32-bit numbers.
        vocabulary: The ids that may be drawn.
        embedding_VM: (V, M), the embedding.

    Returns:
        int64 (R,).

    Raises:
        ValueError: The embedding is missing or of another vocabulary.

    Source: our definition; a variant of Rep(Sim) (arXiv:2104.01853).
    """
    if embedding_VM is None or len(embedding_VM) != len(vocabulary.special_V):
        shape = None if embedding_VM is None else tuple(embedding_VM.shape)
        raise ValueError(
            f"embedding_VM has shape {shape}; replace_by='similar' needs one row for each of the "
            f"{len(vocabulary.special_V)} ids: pass the source embedding's weight"
        )
    original_R1 = torch.searchsorted(vocabulary.drawable_N, original_R)[:, None]
    with torch.autocast(original_R.device.type, enabled=False):
        unit_NM = F.normalize(embedding_VM[vocabulary.drawable_N].float(), dim=1)
        score_RN = unit_NM[original_R1.squeeze(1)] / SIMILARITY_TEMPERATURE @ unit_NM.T
    score_RN.scatter_(1, original_R1, -math.inf)
    # In float64 the 32 bits stay below the row's sum, so the search always ends on an id.
    cumulative_RN = score_RN.softmax(1).cumsum(1, dtype=torch.float64)
    drawn_R1 = bits_R[:, None].double() / (1 << NUM_BITS) * cumulative_RN[:, -1:]
    return vocabulary.drawable_N[torch.searchsorted(cumulative_RN, drawn_R1, right=True).squeeze(1)]


def _check_batch(
    input_ids_BS: Tensor, attention_mask_BS: Tensor, sentence_id_B: Tensor, vocabulary: Vocabulary
) -> None:
    if input_ids_BS.ndim != 2 or input_ids_BS.dtype != torch.int64:
        raise ValueError(
            f"input_ids_BS is {input_ids_BS.dtype} of shape {tuple(input_ids_BS.shape)}; it must be int64 of shape "
            f"(sentences, slots): pad the batch and call .long()"
        )
    if attention_mask_BS.shape != input_ids_BS.shape:
        raise ValueError(
            f"attention_mask_BS has shape {tuple(attention_mask_BS.shape)} and input_ids_BS "
            f"{tuple(input_ids_BS.shape)}; they must agree: pass the mask of this batch"
        )
    if sentence_id_B.shape != input_ids_BS.shape[:1] or sentence_id_B.is_floating_point():
        raise ValueError(
            f"sentence_id_B is {sentence_id_B.dtype} of shape {tuple(sentence_id_B.shape)}; it must hold one integer "
            f"for each of the {len(input_ids_BS)} sentences: pass the rows' indices in the data set"
        )
    devices = {tensor.device for tensor in (input_ids_BS, attention_mask_BS, sentence_id_B, vocabulary.special_V)}
    if len(devices) > 1:
        raise ValueError(
            f"vocabulary is on {vocabulary.special_V.device} and the batch on {input_ids_BS.device}; input_ids_BS, "
            f"attention_mask_BS, sentence_id_B and vocabulary must share one device: call vocabulary.to(device)"
        )
    num_ids = len(vocabulary.special_V)
    if input_ids_BS.numel() and not (input_ids_BS.min() >= 0 and input_ids_BS.max() < num_ids):
        raise ValueError(
            f"input_ids_BS runs from {int(input_ids_BS.min())} to {int(input_ids_BS.max())}; the vocabulary has ids "
            f"0 to {num_ids - 1}: build it from the tokenizer that made the batch"
        )
