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
from typing import Literal

import torch
from torch import Tensor

from bliss.config import AUGMENTATIONS, BlissConfig, RivalConfig
from bliss.corrector import Corrector, CorrectorLayer
from bliss.network import Change, EncoderDecoder, decode_target, encode_source

SHUFFLE, REPLACE, DRAW = range(3)
CHOICE, TOKEN, COUNT = range(3)


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


def corrupt(
    ids: Sequence[int],
    *,
    sentence_id: int,
    epoch: int,
    seed: int,
    side: Literal["source", "target"],
    special: Sequence[bool],
    config: RivalConfig,
    rate: float,
    embedding_VM: Tensor | None = None,
) -> tuple[list[int], list[bool]]:
    """Cut or replace tokens of one side of one sentence, without padding.

    Args:
        ids: The source, or the decoder's input.
        sentence_id: Which sentence of the data set it is.
        epoch: Pass over the data.
        seed: Seed of the run.
        side: Which of the two it is.
        special: For every id, whether it is special.
        config: kind and temperature are read.
        rate: Probability that a token is cut or replaced, at this step.
        embedding_VM: (V, M), the side's embedding; needed by rep_sim.

    Returns:
        For every slot its id, and whether its embedding is kept.

    Source: the papers named in `bliss/corruption.py`.
    """
    first = 3 if side == "source" else 7

    def uniform(use: int, counter: int) -> float:
        return random_bits(sentence_id, counter, seed=seed, epoch=epoch, stream=first + use) / 2**32

    length = sum(not special[token] for token in ids)
    if config.kind == "switchout" and length:
        weights = [math.exp(-count / config.temperature) for count in range(length + 1)]
        left, count = uniform(COUNT, 0) * sum(weights), 0
        while count < length and left >= weights[count]:
            left -= weights[count]
            count += 1
        rate = count / length
    drawable = [index for index, is_special in enumerate(special) if not is_special]
    similar = BlissConfig(replace_by="similar" if config.kind == "rep_sim" else "uniform")
    new_ids, kept, number = list(ids), [True] * len(ids), 0
    for slot, token in enumerate(ids):
        if special[token] or config.kind in ("r_drop", "vat"):
            continue
        number += 1
        if uniform(CHOICE, number) < rate:
            if config.kind in ("word_dropout", "token_cutoff", "simcut"):
                kept[slot] = False
            else:
                new_ids[slot] = _draw(token, uniform(TOKEN, number), drawable, similar, embedding_VM)
    return new_ids, kept


def rival_loss(
    network: EncoderDecoder,
    config: RivalConfig,
    *,
    source: Sequence[int],
    target: Sequence[int],
    corrupted: tuple[tuple[list[int], list[bool]], tuple[list[int], list[bool]]],
    direction: tuple[Tensor, Tensor] | None = None,
    label_smoothing: float,
) -> Tensor:
    """A rival's loss on one sentence without padding; dropout must be off.

    Args:
        network: The encoder-decoder network.
        config: kind, weight and radius are read.
        source: The source.
        target: Its target.
        corrupted: What `corrupt` returned for the source and for the decoder's input.
        direction: Random directions (S, E) and (T, E) from which vat starts.
        label_smoothing: Probability mass that each cross entropy spreads over the vocabulary.

    Returns:
        The loss, 0-d.

    Source: the table of `bliss/rivals.py`.
    """
    inputs = network.prepare_decoder_input_ids_from_labels(torch.tensor([list(target)]))[0].tolist()

    def run(sides: Sequence[tuple[Sequence[int], Change | None]]) -> Tensor:
        (source_ids, source_change), (target_ids, target_change) = sides
        mask = torch.ones(1, len(source_ids), dtype=torch.long)
        states = encode_source(network, torch.tensor([source_ids]), mask, source_change).last_hidden_state
        return decode_target(network, states, mask, torch.tensor([target_ids]), target_change)[0]

    def entropy(logits_TV: Tensor) -> Tensor:
        return sequence_loss(logits_TV, target, label_smoothing=label_smoothing) / len(target)

    def divergence(from_TV: Tensor, to_TV: Tensor) -> Tensor:
        return (from_TV * (from_TV.log() - to_TV.log())).sum() / len(target)

    clean_TV = run([(source, None), (inputs, None)])
    cut_TV = run([(ids, torch.tensor(kept)[:, None].mul) for ids, kept in corrupted])
    p_TV, q_TV = clean_TV.softmax(-1), cut_TV.softmax(-1)
    if config.kind in AUGMENTATIONS:
        return entropy(cut_TV)
    if config.kind == "simcut":
        return entropy(clean_TV) + config.weight * divergence(p_TV, q_TV)
    if config.kind == "r_drop":
        both = (divergence(p_TV, q_TV) + divergence(q_TV, p_TV)) / 2
        return (entropy(clean_TV) + entropy(cut_TV) + config.weight * both) / 2
    if config.kind == "token_cutoff":
        middle_TV = (p_TV + q_TV) / 2
        both = (divergence(p_TV, middle_TV) + divergence(q_TV, middle_TV)) / 2
        return (entropy(clean_TV) + entropy(cut_TV) + config.weight * both) / 2
    assert direction is not None
    stacks = (network.get_encoder().get_input_embeddings(), network.get_decoder().get_input_embeddings())
    pairs = zip(stacks, (source, inputs), strict=True)
    lengths = [embed(torch.tensor(list(ids))).norm().detach() for embed, ids in pairs]
    noise = [(0.01 * length * d / d.norm()).requires_grad_() for length, d in zip(lengths, direction, strict=True)]
    moved_TV = run([(source, noise[0].add), (inputs, noise[1].add)])
    gradients = torch.autograd.grad(divergence(p_TV.detach(), moved_TV.softmax(-1)), noise)
    worst = [config.radius * length * g / g.norm() for length, g in zip(lengths, gradients, strict=True)]
    moved_TV = run([(source, worst[0].add), (inputs, worst[1].add)])
    return entropy(clean_TV) + config.weight * divergence(p_TV.detach(), moved_TV.softmax(-1))
