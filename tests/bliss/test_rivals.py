import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from closeness import assert_close
from torch import Tensor, nn

from bliss import BlissConfig, Corrector, Draw, Rival, RivalConfig, Vocabulary, bliss_losses, perturb, reference
from bliss.config import AUGMENTATIONS, RivalKind
from bliss.corruption import DIRECTION, FIRST_STREAM
from bliss.losses import sequence_loss
from bliss.network import decode_target, encode_source
from bliss.rivals import jensen_shannon, kl, rival_loss, symmetric_kl

NUM_IDS, PAD, EOS = 23, 0, 1
SPECIAL = [index < 3 for index in range(NUM_IDS)]
VOCABULARY = Vocabulary(starts_word_V=torch.arange(NUM_IDS) % 3 != 0, special_V=torch.tensor(SPECIAL))
KINDS: list[RivalKind] = ["word_dropout", "rep_uni", "rep_sim", "switchout", "token_cutoff", "simcut", "r_drop", "vat"]
NETWORKS = ["marian", "bart", "t5", "bert2bert"]
SOURCES = [[5, 7, 9, 8, 11, 12, 13, EOS], [4, 10, EOS], [14, 16, 18, 17, 20, 22, EOS]]
TARGETS = [[8, 6, EOS], [19, 4, 3, 11, EOS], [EOS]]

MakeNetwork = Callable[..., nn.Module]


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


INPUT_IDS, LABELS = padded(SOURCES, PAD), padded(TARGETS, -100)
MASK = padded([[1] * len(row) for row in SOURCES], 0)


def config_of(kind: RivalKind) -> RivalConfig:
    return RivalConfig(kind=kind, rate=0.4, weight=1.5, temperature=3.0, radius=0.2)


def make_rival(kind: RivalKind, rows: Sequence[int] = (0, 1, 2)) -> Rival:
    draw = Draw(sentence_id_B=torch.tensor(rows) + 40, epoch=1, seed=9)
    return Rival(config=config_of(kind), draw=draw, vocabulary=VOCABULARY)


def run(network: nn.Module, rival: Rival, rows: Sequence[int] = (0, 1, 2)) -> tuple[Tensor, Tensor, Tensor]:
    rows = list(rows)
    return rival_loss(
        network, rival, input_ids_BS=INPUT_IDS[rows], attention_mask_BS=MASK[rows], labels_BT=LABELS[rows],
        label_smoothing=0.1,
    )  # fmt: skip


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def direction_of(number: int, ids: Sequence[int], width: int, side: str) -> Tensor:
    """Uniform numbers in [-1, 1), counted through the sentence's coordinates."""
    stream = FIRST_STREAM[side] + DIRECTION  # type: ignore[index]
    bits = [
        reference.random_bits(40 + number, counter, seed=9, epoch=1, stream=stream)
        for counter in range(len(ids) * width)
    ]
    return torch.tensor(bits).float().view(len(ids), width) / 2**31 - 1


def reference_results(network: nn.Module, kind: RivalKind) -> dict[str, Tensor]:
    network.zero_grad()
    config = config_of(kind)
    embeddings = [stack.get_input_embeddings().weight for stack in (network.get_encoder(), network.get_decoder())]
    dtype, width = embeddings[0].dtype, embeddings[0].shape[1]
    total = torch.zeros((), dtype=dtype)
    for index, (source, target) in enumerate(zip(SOURCES, TARGETS, strict=True)):
        inputs = network.prepare_decoder_input_ids_from_labels(torch.tensor([target]))[0].tolist()
        sides = (("source", source), ("target", inputs))
        corrupted = [
            reference.corrupt(
                ids, sentence_id=40 + index, epoch=1, seed=9, side=side, special=SPECIAL, config=config, rate=0.4,
                embedding_VM=embedding.detach(),
            )
            for (side, ids), embedding in zip(sides, embeddings, strict=True)
        ]  # fmt: skip
        directions = [direction_of(index, ids, width, side).to(dtype) for side, ids in sides]
        loss = reference.rival_loss(
            network, config, source=source, target=target, corrupted=(corrupted[0], corrupted[1]),
            direction=(directions[0], directions[1]), label_smoothing=0.1,
        )  # fmt: skip
        total = total + loss * len(target)
    total = total / sum(map(len, TARGETS))
    total.backward()
    return {"total": total.detach()} | gradients(network)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network_kind", NETWORKS)
def test_equals_the_reference_sentence_by_sentence(
    make_network: MakeNetwork, network_kind: str, kind: RivalKind
) -> None:
    network = make_network(network_kind)
    loss, _, _ = run(network, make_rival(kind))
    loss.backward()
    actual = {"total": loss.detach()} | gradients(network)
    expected = reference_results(network, kind)
    truth = reference_results(copy.deepcopy(network).double(), kind)
    assert expected.keys() == actual.keys() == truth.keys()
    assert_close("total", actual["total"], expected["total"], truth["total"])
    # All gradients at once: some vanish, and their own size does not tell what a rounding is.
    every = [torch.cat([value.flatten() for value in found.values()]) for found in (actual, expected, truth)]
    assert_close("gradients", *every)


@pytest.mark.parametrize("kind", KINDS)
def test_is_repeatable_and_independent_of_the_batch(make_network: MakeNetwork, kind: RivalKind) -> None:
    network = make_network("marian")
    losses = [run(network, make_rival(kind, [row]), [row])[0] * len(TARGETS[row]) for row in (2, 0, 1)]
    together = run(network, make_rival(kind))[0]
    assert torch.equal(together, run(network, make_rival(kind))[0])
    double = run(copy.deepcopy(network).double(), make_rival(kind))[0]
    assert_close(kind, together, torch.stack(losses).sum() / sum(map(len, TARGETS)), double)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - set(AUGMENTATIONS)))
def test_identical_passes_add_nothing_but_their_cross_entropy(make_network: MakeNetwork, kind: RivalKind) -> None:
    network = make_network("marian")
    rival = make_rival(kind)
    still = Rival(
        config=RivalConfig(kind=kind, rate=0.0, weight=7.0, radius=0.0), draw=rival.draw, vocabulary=VOCABULARY
    )
    loss, logits_BTV, states_BSM = run(network, still)
    states = encode_source(network, INPUT_IDS, MASK).last_hidden_state
    plain = decode_target(network, states, MASK, network.prepare_decoder_input_ids_from_labels(LABELS))
    assert torch.equal(logits_BTV, plain)
    assert torch.equal(states_BSM, states)
    assert torch.equal(loss, sequence_loss(plain, LABELS, label_smoothing=0.1))


def test_rdrop_compares_two_dropout_masks(make_network: MakeNetwork) -> None:
    network = make_network("marian", dropout=0.3)
    torch.manual_seed(0)
    loss, logits_BTV, _ = run(network, make_rival("r_drop"))
    torch.manual_seed(0)
    decoder_inputs = network.prepare_decoder_input_ids_from_labels(LABELS)
    passes = [
        decode_target(network, encode_source(network, INPUT_IDS, MASK).last_hidden_state, MASK, decoder_inputs)
        for _ in range(2)
    ]
    assert torch.equal(logits_BTV, passes[0])
    assert not torch.equal(*passes)
    entropies = sum(sequence_loss(logits, LABELS, label_smoothing=0.1) for logits in passes)
    assert torch.equal(loss, (entropies + 1.5 * symmetric_kl(*passes, LABELS)) / 2)


def test_vat_moves_the_prediction_more_than_random_noise_of_the_same_length(make_network: MakeNetwork) -> None:
    network = make_network("marian")
    worst = run(network, make_rival("vat"))[0]
    plain = sequence_loss(run(network, make_rival("vat"))[1], LABELS, label_smoothing=0.1)
    logits = run(network, make_rival("vat"))[1].detach()
    lengths = [stack.get_input_embeddings().weight for stack in (network.get_encoder(), network.get_decoder())]
    assert lengths[0].shape == lengths[1].shape
    divergences = []
    for seed in range(5):
        torch.manual_seed(seed)

        def noisy(embedded: Tensor) -> Tensor:
            noise = torch.randn_like(embedded)
            return embedded + 0.2 * noise * embedded.norm(dim=(1, 2), keepdim=True) / noise.norm(
                dim=(1, 2), keepdim=True
            )

        states = encode_source(network, INPUT_IDS, MASK, noisy).last_hidden_state
        inputs = network.prepare_decoder_input_ids_from_labels(LABELS)
        divergences.append(kl(logits, decode_target(network, states, MASK, inputs, noisy), LABELS))
    assert (worst - plain) / 1.5 > torch.stack(divergences).mean()


def test_divergences_are_zero_for_equals_symmetric_where_they_should_be_and_bounded() -> None:
    torch.manual_seed(1)
    first, second = torch.randn(2, 3, 5, 7).unbind()
    labels = padded([[1] * 5, [2] * 2, [3]], -100)
    for distance in (kl, symmetric_kl, jensen_shannon):
        assert abs(distance(first, first, labels)) <= torch.finfo(torch.float32).eps * 5
        assert distance(first, second, labels) > 0
        nothing = distance(first, second, torch.full_like(labels, -100))
        assert nothing == 0
    assert torch.equal(symmetric_kl(first, second, labels), symmetric_kl(second, first, labels))
    assert jensen_shannon(1e3 * first, 1e3 * second, labels) <= torch.log(torch.tensor(2.0))


@pytest.mark.parametrize("kind", KINDS)
def test_takes_the_place_of_the_sequence_loss_beside_the_self_supervised_task(
    make_network: MakeNetwork, kind: RivalKind
) -> None:
    network, config = make_network("marian"), BlissConfig(weight=0.7, replace_ratio=0.5)
    corrector = Corrector(config, d_model=8, num_heads=2, d_ff=12, vocab_size=NUM_IDS, dropout=0.0)
    perturbed = perturb(
        INPUT_IDS, MASK, sentence_id_B=torch.arange(3), epoch=0, seed=1, vocabulary=VOCABULARY, config=config
    )
    batch = {"input_ids_BS": INPUT_IDS, "attention_mask_BS": MASK, "labels_BT": LABELS, "perturbed": perturbed}
    alone = bliss_losses(network, corrector, **batch, config=config)
    joined = bliss_losses(network, corrector, **batch, config=config, rival=make_rival(kind))
    assert torch.equal(joined.sequence, run(network, make_rival(kind))[0])
    assert torch.equal(joined.token, alone.token)
    assert torch.equal(joined.position, alone.position)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["perturbed", "both", "corrected"])
def test_goes_with_the_modes_that_make_sense_and_refuses_the_others(
    make_network: MakeNetwork, kind: RivalKind, mode: str
) -> None:
    network, config = make_network("marian"), BlissConfig(mode=mode, weight=0.0, replace_ratio=0.5)  # type: ignore[arg-type]
    perturbed = perturb(
        INPUT_IDS, MASK, sentence_id_B=torch.arange(3), epoch=0, seed=1, vocabulary=VOCABULARY, config=config
    )
    corrector = Corrector(config, d_model=8, num_heads=2, d_ff=12, vocab_size=NUM_IDS, dropout=0.0)
    rival = make_rival(kind)

    def losses() -> Tensor:
        batch = {"input_ids_BS": INPUT_IDS, "attention_mask_BS": MASK, "labels_BT": LABELS, "perturbed": perturbed}
        return bliss_losses(network, corrector, **batch, config=config, rival=rival).sequence

    if kind in AUGMENTATIONS or mode == "corrected":
        with pytest.raises(ValueError, match=f"rival is '{kind}' and config.mode='{mode}'"):
            losses()
        return
    on_noise = rival_loss(
        network, rival, input_ids_BS=perturbed.input_ids_BS, attention_mask_BS=MASK, labels_BT=LABELS,
        label_smoothing=0.1,
    )[0]  # fmt: skip
    expected = [run(network, rival)[0], on_noise] if mode == "both" else [on_noise]
    assert torch.equal(losses(), torch.stack(expected).mean())
