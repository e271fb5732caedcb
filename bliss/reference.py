"""The meaning of BLISS, one sentence, one word and one token at a time, without padding.

S  slot of the source
T  slot of the target
M  width of the encoder
E  width of an attention head
V  id of the vocabulary
D  displacement class, -K' to K'
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bliss.config import BlissConfig
from bliss.corrector import Corrector, CorrectorLayer
from bliss.objective import EncoderDecoder

SHUFFLE, REPLACE, DRAW = range(3)


def random_bits(sentence_id: int, counter: int, *, seed: int, epoch: int, stream: int) -> int:
    """Hash five numbers into a uniform 32-bit one (not in the paper)."""
    state = 0
    for word in (seed, seed >> 32, epoch, stream, sentence_id, sentence_id >> 32, counter):
        state = ((word % 2**32 ^ state) + 0x9E3779B9) % 2**32
        for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
            state = (state ^ state >> shift) * factor % 2**32
        state ^= state >> 15
    return state


def perturb(
    input_ids: Sequence[int],
    *,
    sentence_id: int,
    epoch: int,
    seed: int,
    starts_word: Sequence[bool],
    special: Sequence[bool],
    config: BlissConfig,
    replace_ratio: float,
    embedding_VM: Tensor | None = None,
) -> tuple[list[int], list[int], list[bool]]:
    """Perturb one sentence without padding.

    Args:
        input_ids: The sentence.
        sentence_id: Which sentence of the data set it is.
        epoch: Pass over the data.
        seed: Seed of the run.
        starts_word: For every id, whether it begins a word.
        special: For every id, whether it is special.
        config: shuffle_range and replace_by are read.
        replace_ratio: Probability that a word is replaced, at this step.
        embedding_VM: (V, M), the source embedding; needed with replace_by="similar".

    Returns:
        For every perturbed slot: its id, the original slot whose token it holds, and whether it was replaced.

    Source: our definition (the paper's text gives none).
    """

    def uniform(stream: int, counter: int) -> float:
        return random_bits(sentence_id, counter, seed=seed, epoch=epoch, stream=stream) / 2**32

    drawable = [index for index, is_special in enumerate(special) if not is_special]
    new_ids, replaced = list(input_ids), [False] * len(input_ids)
    source_slot: list[int] = []
    num_words = num_tokens = 0
    for section in _sections(input_ids, starts_word, special):
        if special[input_ids[section[0][0]]]:
            source_slot += section[0]
            continue
        scores = []
        for word in section:
            num_words += 1
            scores.append(num_words + uniform(SHUFFLE, num_words) * config.shuffle_range)
            for slot in word:
                num_tokens += 1
                replaced[slot] = uniform(REPLACE, num_words) < replace_ratio
                if replaced[slot]:
                    choice = uniform(DRAW, num_tokens)
                    new_ids[slot] = _draw(input_ids[slot], choice, drawable, config, embedding_VM)
        for index in sorted(range(len(section)), key=scores.__getitem__):
            source_slot += section[index]
    return [new_ids[slot] for slot in source_slot], source_slot, [replaced[slot] for slot in source_slot]


def _sections(input_ids: Sequence[int], starts_word: Sequence[bool], special: Sequence[bool]) -> list[list[list[int]]]:
    """Runs of words, as lists of slots; a special token is a section of its own, so that no word crosses it."""
    sections: list[list[list[int]]] = []
    for slot, token in enumerate(input_ids):
        if slot == 0 or special[token] or special[input_ids[slot - 1]]:
            sections.append([[slot]])
        elif starts_word[token]:
            sections[-1].append([slot])
        else:
            sections[-1][-1].append(slot)
    return sections


def _draw(token: int, choice: float, drawable: Sequence[int], config: BlissConfig, embedding_VM: Tensor | None) -> int:
    if config.replace_by == "uniform":
        return drawable[int(choice * len(drawable))]
    assert embedding_VM is not None
    others = [other for other in drawable if other != token]
    cosines = [torch.cosine_similarity(embedding_VM[token], embedding_VM[other], dim=0).item() for other in others]
    weights = [math.exp(cosine / 0.1) for cosine in cosines]
    left = choice * sum(weights)
    for other, weight in zip(others, weights, strict=True):
        left -= weight
        if left < 0:
            return other
    return others[-1]


def sequence_loss(logits_TV: Tensor, labels: Sequence[int], *, label_smoothing: float) -> Tensor:
    """Sum of label-smoothed cross entropies over the target tokens of a sentence (our definition)."""
    total = logits_TV.new_zeros(())
    for logits_V, label in zip(logits_TV, labels, strict=True):
        if label != -100:
            log_p_V = logits_V.log_softmax(0)
            total = total - (1 - label_smoothing) * log_p_V[label] - label_smoothing * log_p_V.mean()
    return total


def position_target(displacement: int, *, max_displacement: int, temperature: float) -> list[float]:
    """Probability of every displacement from -K' to K' (our definition)."""
    clipped = min(max(displacement, -max_displacement), max_displacement)
    distances = [abs(d - clipped) for d in range(-max_displacement, max_displacement + 1)]
    if temperature == 0:
        return [float(distance == 0) for distance in distances]
    weights = [math.exp(-distance / temperature) for distance in distances]
    return [weight / sum(weights) for weight in weights]


def position_loss(logits_D: Tensor, displacement: int, *, max_displacement: int, temperature: float) -> Tensor:
    """Cross entropy of one slot's displacement against its soft target (our definition)."""
    target = position_target(displacement, max_displacement=max_displacement, temperature=temperature)
    log_p_D = logits_D.log_softmax(0)
    return -sum((q * log_p for q, log_p in zip(target, log_p_D, strict=True)), log_p_D.new_zeros(()))


def correct(corrector: Corrector, states_SM: Tensor) -> Tensor:
    """Corrected states (S, M) of one sentence without padding, head by head, without dropout (our definition)."""
    for layer in corrector.layers:
        assert isinstance(layer, CorrectorLayer)
        q_SM, k_SM, v_SM = layer.query_key_value(states_SM).chunk(3, dim=1)
        heads = []
        for q_SE, k_SE, v_SE in zip(*(part.chunk(layer.num_heads, dim=1) for part in (q_SM, k_SM, v_SM)), strict=True):
            heads.append((q_SE @ k_SE.T / math.sqrt(q_SE.shape[1])).softmax(1) @ v_SE)
        states_SM = layer.attention_norm(states_SM + layer.attended(torch.cat(heads, dim=1)))
        states_SM = layer.feed_forward_norm(states_SM + layer.contract(layer.expand(states_SM).relu()))
    return states_SM


def bliss_loss(
    network: EncoderDecoder,
    corrector: Corrector,
    *,
    sources: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    perturbed: Sequence[tuple[Sequence[int], Sequence[int], Sequence[bool]]],
    config: BlissConfig,
) -> Tensor:
    """The objective on a batch of sentences, each run alone and without padding; dropout must be off.

    Args:
        network: The encoder-decoder network.
        corrector: The corrector.
        sources: The clean source sentences.
        targets: Their targets.
        perturbed: What `perturb` returned for each source.
        config: The method's choices.

    Returns:
        L, 0-d.

    Source: our definition (the paper's text gives none).
    """
    counts = {"sequence": 0, "token": 0, "position": 0}
    embedding_VM = network.get_input_embeddings().weight
    sums = {name: embedding_VM.new_zeros(()) for name in counts}
    for source, target, (noisy, source_slot, replaced) in zip(sources, targets, perturbed, strict=True):
        clean_SM, noisy_SM = _encode(network, source), _encode(network, noisy)
        z_SM = correct(corrector, noisy_SM)
        reads = {"clean": [clean_SM], "perturbed": [noisy_SM], "both": [clean_SM, noisy_SM], "corrected": [z_SM]}
        for states_SM in reads[config.mode]:
            logits_TV = _decode(network, states_SM, target)
            loss = sequence_loss(logits_TV, target, label_smoothing=config.label_smoothing)
            sums["sequence"] = sums["sequence"] + loss
            counts["sequence"] += len(target)
        for slot, (original, is_replaced) in enumerate(zip(source_slot, replaced, strict=True)):
            in_place = config.target == "restore_in_place"
            if config.token_slots == "all" or is_replaced or (in_place and original != slot):  # noqa: S105
                log_p_V = corrector.token_logits(z_SM[slot : slot + 1], embedding_VM)[0].log_softmax(0)
                sums["token"] = sums["token"] - log_p_V[source[slot if in_place else original]]
                counts["token"] += 1
            if not in_place:
                sums["position"] = sums["position"] + position_loss(
                    corrector.position_logits(z_SM[slot : slot + 1])[0],
                    original - slot,
                    max_displacement=config.max_displacement,
                    temperature=config.temperature,
                )
                counts["position"] += 1
    means = {name: sums[name] / max(counts[name], 1) for name in sums}
    return means["sequence"] + config.weight * (means["token"] + means["position"])


def _encode(network: EncoderDecoder, tokens: Sequence[int]) -> Tensor:
    return network.get_encoder()(input_ids=torch.tensor([list(tokens)])).last_hidden_state[0]


def _decode(network: EncoderDecoder, states_SM: Tensor, target: Sequence[int]) -> Tensor:
    labels = torch.tensor([list(target)])
    decoder_input_ids = network.prepare_decoder_input_ids_from_labels(labels)
    return network(encoder_outputs=(states_SM[None],), decoder_input_ids=decoder_input_ids).logits[0]
