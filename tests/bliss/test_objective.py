import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from closeness import ORDER_FACTOR, assert_close
from torch import Tensor, nn

from bliss import BlissConfig, BlissLosses, Corrector, Vocabulary, bliss_losses, encode, perturb, reference
from bliss.generator import Perturbed
from bliss.losses import sequence_loss

NUM_IDS, PAD, EOS = 23, 0, 1
KINDS = ["marian", "bart", "t5", "bert2bert"]
MODES = ["clean", "perturbed", "both", "corrected"]
VOCABULARY = Vocabulary(starts_word_V=torch.arange(NUM_IDS) % 3 != 0, special_V=torch.arange(NUM_IDS) < 3)
SOURCES = [[5, 7, 9, 8, 11, 12, 13, EOS], [4, 10, EOS], [14, 16, 18, 17, 20, 22, EOS]]
TARGETS = [[8, 6, EOS], [19, 4, 3, 11, EOS], [EOS]]

MakeNetwork = Callable[..., nn.Module]


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


INPUT_IDS, LABELS = padded(SOURCES, PAD), padded(TARGETS, -100)
MASK = padded([[1] * len(row) for row in SOURCES], 0)


def make_config(**choices: object) -> BlissConfig:
    return BlissConfig(**({"weight": 0.7, "replace_ratio": 0.5} | choices))  # type: ignore[arg-type]


def make_corrector(config: BlissConfig, dropout: float = 0.0) -> Corrector:
    return Corrector(config, d_model=8, num_heads=2, d_ff=12, vocab_size=NUM_IDS, dropout=dropout)


def noise(config: BlissConfig, input_ids: Tensor = INPUT_IDS, mask: Tensor = MASK) -> Perturbed:
    ids = torch.arange(len(input_ids))
    return perturb(input_ids, mask, sentence_id_B=ids, epoch=1, seed=3, vocabulary=VOCABULARY, config=config)


def losses_of(network: nn.Module, corrector: Corrector | None, config: BlissConfig, **changes: object) -> BlissLosses:
    batch = {"input_ids_BS": INPUT_IDS, "attention_mask_BS": MASK, "labels_BT": LABELS, "perturbed": noise(config)}
    return bliss_losses(network, corrector, **(batch | changes), config=config)  # type: ignore[arg-type]


def gradients(*modules: nn.Module) -> dict[str, Tensor]:
    named = (
        parameter for index, module in enumerate(modules) for parameter in module.named_parameters(prefix=str(index))
    )
    return {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}


def reference_results(network: nn.Module, corrector: Corrector, config: BlissConfig) -> dict[str, Tensor]:
    network.zero_grad()
    corrector.zero_grad()
    perturbed, lengths = noise(config), [len(row) for row in SOURCES]
    rows = [
        tuple(
            tensor[index, :length].tolist()
            for tensor in (perturbed.input_ids_BS, perturbed.source_slot_BS, perturbed.replaced_BS)
        )
        for index, length in enumerate(lengths)
    ]
    total = reference.bliss_loss(network, corrector, sources=SOURCES, targets=TARGETS, perturbed=rows, config=config)  # type: ignore[arg-type]
    total.backward()
    return {"total": total.detach()} | gradients(network, corrector)


def check_against_reference(network: nn.Module, config: BlissConfig) -> None:
    corrector = make_corrector(config)
    total = losses_of(network, corrector, config).total
    total.backward()
    actual = {"total": total.detach()} | gradients(network, corrector)
    expected = reference_results(network, corrector, config)
    truth = reference_results(copy.deepcopy(network).double(), copy.deepcopy(corrector).double(), config)
    assert expected.keys() <= actual.keys()
    for name, value in actual.items():
        if name in expected:
            assert_close(name, value, expected[name], truth[name])
        else:  # a term that counts no slot reaches its parameters with zeros here, and not at all in the reference
            assert not value.any(), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference_in_every_mode_and_network(make_network: MakeNetwork, kind: str, mode: str) -> None:
    check_against_reference(make_network(kind), make_config(mode=mode))


@pytest.mark.parametrize(
    "choices",
    [
        {"token_slots": "all"},
        {"target": "restore_in_place"},
        {"target": "restore_in_place", "token_slots": "all"},
        {"temperature": 0.0, "max_displacement": 1},
        {"corrector_layers": 0},
        {"corrector_layers": 2, "mode": "corrected"},
        {"replace_ratio": 0.0},
        {"replace_ratio": 1.0, "shuffle_range": 0},
        {"label_smoothing": 0.0, "mode": "both"},
    ],
    ids=str,
)
def test_equals_the_reference_for_every_switch(make_network: MakeNetwork, choices: dict[str, object]) -> None:
    check_against_reference(make_network("marian"), make_config(**choices))


@pytest.mark.parametrize("kind", KINDS)
def test_weight_zero_is_plain_training_bit_for_bit(make_network: MakeNetwork, kind: str) -> None:
    network, config = make_network(kind, dropout=0.3), make_config(weight=0.0)
    torch.manual_seed(1)
    plain = network(
        input_ids=INPUT_IDS,
        attention_mask=MASK,
        decoder_input_ids=network.prepare_decoder_input_ids_from_labels(LABELS),
    )
    plain_loss = sequence_loss(plain.logits, LABELS, label_smoothing=0.1)
    plain_loss.backward()
    plain_state, plain_gradients = torch.get_rng_state(), gradients(network)

    network.zero_grad()
    torch.manual_seed(1)
    corrector = make_corrector(config, dropout=0.3)
    losses = losses_of(network, corrector, config)
    losses.total.backward()
    assert torch.equal(losses.total, plain_loss)
    assert torch.equal(losses.logits_BTV, plain.logits)
    assert torch.equal(torch.get_rng_state(), plain_state)
    assert gradients(network).keys() == plain_gradients.keys()
    assert all(torch.equal(grad, plain_gradients[name]) for name, grad in gradients(network).items())
    assert not gradients(corrector)

    torch.manual_seed(1)
    assert torch.equal(losses_of(network, None, config, perturbed=None).total, plain_loss)


@pytest.mark.parametrize("kind", ["marian", "bart", "t5"])
def test_networks_own_labels_path_gives_the_same_logits(make_network: MakeNetwork, kind: str) -> None:
    network = make_network(kind)
    own = network(input_ids=INPUT_IDS, attention_mask=MASK, labels=LABELS).logits
    assert torch.equal(losses_of(network, None, make_config(weight=0.0)).logits_BTV, own)


def test_weight_zero_in_mode_perturbed_is_plain_noising(make_network: MakeNetwork) -> None:
    network, config = make_network("marian", dropout=0.3), make_config(weight=0.0, mode="perturbed")
    torch.manual_seed(1)
    noised = losses_of(network, None, config)
    torch.manual_seed(1)
    plain = losses_of(network, None, make_config(weight=0.0), input_ids_BS=noise(config).input_ids_BS)
    assert torch.equal(noised.total, plain.total)


def test_no_perturbation_gives_the_baselines_sequence_loss(make_network: MakeNetwork) -> None:
    network = make_network("marian", dropout=0.3)
    totals = []
    for mode, weight in (("clean", 0.0), ("clean", 0.7), ("perturbed", 0.7)):
        config = make_config(mode=mode, weight=weight, shuffle_range=1, replace_ratio=0.0)
        torch.manual_seed(1)
        totals.append(losses_of(network, make_corrector(config, dropout=0.3), config).sequence)
    assert torch.equal(totals[0], totals[1])
    assert torch.equal(totals[0], totals[2])


@pytest.mark.parametrize("mode", MODES)
def test_sequence_loss_does_not_depend_on_the_weight(make_network: MakeNetwork, mode: str) -> None:
    network = make_network("marian", dropout=0.3)
    losses = []
    for weight in (0.0, 0.1, 5.0):
        config = make_config(mode=mode, weight=weight)
        torch.manual_seed(1)
        losses.append(losses_of(network, make_corrector(config, dropout=0.3), config))
    assert torch.equal(losses[0].sequence, losses[1].sequence)
    assert torch.equal(losses[1].sequence, losses[2].sequence)
    assert losses[2].token > 0
    expected = losses[2].sequence + 5.0 * (losses[2].token + losses[2].position)
    assert torch.equal(losses[2].total, expected)


def test_mode_both_is_the_mean_of_the_two_passes(make_network: MakeNetwork) -> None:
    network = make_network("marian")
    clean, noisy, both = (losses_of(network, None, make_config(mode=mode, weight=0.0)) for mode in MODES[:3])
    assert torch.equal(both.sequence, torch.stack([clean.sequence, noisy.sequence]).mean())
    assert torch.equal(both.logits_BTV, clean.logits_BTV)
    assert not torch.equal(clean.sequence, noisy.sequence)


def touched(module: nn.Module) -> set[str]:
    return {
        name for name, parameter in module.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }


@pytest.mark.parametrize("term", ["sequence", "token", "position"])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_reach_what_they_should_and_nothing_else(make_network: MakeNetwork, mode: str, term: str) -> None:
    network, config = make_network("marian"), make_config(mode=mode)
    corrector = make_corrector(config)
    getattr(losses_of(network, corrector, config), term).backward()
    reached, corrected = touched(network), touched(corrector)
    assert any(name.startswith("model.encoder.layers") for name in reached)
    assert any(name.startswith("model.decoder.layers") for name in reached) == (term == "sequence")
    assert any(name.startswith("layers") for name in corrected) == (term != "sequence" or mode == "corrected")
    assert ("token_bias_V" in corrected) == (term == "token")
    assert any(name.startswith("position_head") for name in corrected) == (term == "position")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_is_repeatable_and_finite_on_hostile_batches(make_network: MakeNetwork, kind: str, mode: str) -> None:
    network, config = make_network(kind), make_config(mode=mode)
    corrector = make_corrector(config)
    mask = MASK.clone()
    mask[1] = 0  # a row of padding alone
    changes = {
        "attention_mask_BS": mask,
        "labels_BT": torch.full_like(LABELS, -100),
        "perturbed": noise(config, INPUT_IDS, mask),
    }
    losses = losses_of(network, corrector, config, **changes)
    losses.total.backward()
    assert losses.sequence == 0
    assert torch.isfinite(losses.total)
    assert all(torch.isfinite(grad).all() for grad in gradients(network, corrector).values())
    assert torch.equal(losses.total, losses_of(network, corrector, config, **changes).total)


def test_nothing_to_restore_gives_zero_and_leaves_gradients_in_place(make_network: MakeNetwork) -> None:
    network, config = make_network("marian"), make_config(replace_ratio=0.0)
    corrector = make_corrector(config)
    losses = losses_of(network, corrector, config)
    losses.total.backward()
    assert losses.token == 0
    assert losses.position > 0
    assert "accuracy_token" not in losses.logs()
    assert all(parameter.grad is not None for parameter in corrector.parameters())  # or DDP would wait for them


def test_restoring_in_place_counts_moved_slots_and_has_no_position_term(make_network: MakeNetwork) -> None:
    config = make_config(target="restore_in_place", replace_ratio=0.0, shuffle_range=5)
    losses = losses_of(make_network("marian"), make_corrector(config), config)
    assert losses.token > 0
    assert losses.position == 0
    assert set(losses.accuracies) == {"token"}


def test_logs_are_plain_numbers_and_accuracies_are_right(make_network: MakeNetwork) -> None:
    config = make_config(temperature=0.0, token_slots="all", corrector_layers=0, max_displacement=1)
    corrector, perturbed = make_corrector(config), noise(config)
    displacement_BS = perturbed.source_slot_BS - torch.arange(INPUT_IDS.shape[1])
    real_BS = MASK != 0
    with torch.no_grad():
        corrector.token_bias_V[5] = 1e4  # always answers 5
        assert corrector.position_head is not None
        corrector.position_head.bias[2] = 1e4  # always answers "one or more to the right"
    logs = losses_of(make_network("marian"), corrector, config).logs()
    count = int(real_BS.sum())
    assert set(logs) == {
        *(f"loss_{name}" for name in ("total", "sequence", "token", "position")),
        *(f"accuracy_{name}" for name in ("token", "position", "position_constant")),
    }
    assert all(type(value) is float for value in logs.values())
    targets_BS = INPUT_IDS.gather(1, perturbed.source_slot_BS)
    for name, flags_BS in (
        ("token", targets_BS == 5),
        ("position", displacement_BS >= 1),
        ("position_constant", displacement_BS == 0),
    ):
        assert round(logs[f"accuracy_{name}"] * count) == int((flags_BS & real_BS).sum()), name


def test_the_corrector_can_learn_the_task(make_network: MakeNetwork) -> None:
    network, config = make_network("marian"), make_config(replace_ratio=0.3, temperature=0.0)
    corrector = make_corrector(config)
    optimizer = torch.optim.Adam([*network.parameters(), *corrector.parameters()], lr=0.02)
    first = losses_of(network, corrector, config).logs()
    for _ in range(150):
        optimizer.zero_grad()
        losses_of(network, corrector, config).total.backward()
        optimizer.step()
    last = losses_of(network, corrector, config).logs()
    assert last["loss_token"] < first["loss_token"] / 2
    assert last["accuracy_position"] > last["accuracy_position_constant"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_generates_from_what_the_decoder_was_trained_to_read(make_network: MakeNetwork, kind: str, mode: str) -> None:
    network, config = make_network(kind).eval(), make_config(mode=mode, weight=0.0, shuffle_range=0, replace_ratio=0.0)
    corrector = make_corrector(config).eval()
    batch = {"input_ids_BS": INPUT_IDS, "attention_mask_BS": MASK, "config": config}
    outputs = encode(network, corrector, **batch)  # type: ignore[arg-type]
    trained = losses_of(network, corrector, config).logits_BTV
    read = network(
        encoder_outputs=outputs,
        attention_mask=MASK,
        decoder_input_ids=network.prepare_decoder_input_ids_from_labels(LABELS),
    )
    assert torch.equal(read.logits, trained)  # without noise, training and inference read the same states

    settings = {"max_new_tokens": 5, "num_beams": 2, "do_sample": False, "decoder_start_token_id": PAD}
    generated = network.generate(encoder_outputs=outputs, attention_mask=MASK, **settings)
    assert len(generated) == len(SOURCES)
    if mode != "corrected":
        plain = network.generate(input_ids=INPUT_IDS, attention_mask=MASK, **settings)
        assert torch.equal(generated, plain)
        bare = encode(network, None, **batch)  # type: ignore[arg-type]
        assert torch.equal(bare.last_hidden_state, network.get_encoder()(input_ids=INPUT_IDS, attention_mask=MASK)[0])
    else:
        z = corrector(network.get_encoder()(input_ids=INPUT_IDS, attention_mask=MASK)[0], MASK)
        assert torch.equal(encode(network, corrector, **batch).last_hidden_state, z)  # type: ignore[arg-type]


def test_bfloat16_autocast_is_as_good_as_its_precision(make_network: MakeNetwork) -> None:
    network, config = make_network("marian"), make_config()
    corrector = make_corrector(config)
    exact = losses_of(network, corrector, config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = losses_of(network, corrector, config)
    assert rough.total.dtype == torch.float32
    budget = ORDER_FACTOR * torch.finfo(torch.bfloat16).eps * exact.total
    assert abs(rough.total - exact.total) < budget


def test_names_what_is_missing(make_network: MakeNetwork) -> None:
    network, config = make_network("marian"), make_config()
    corrector = make_corrector(config)
    with pytest.raises(ValueError, match=r"perturbed is None; mode='clean' with weight=0\.7"):
        losses_of(network, corrector, config, perturbed=None)
    for mode in MODES[1:]:
        with pytest.raises(ValueError, match="perturbed is None"):
            losses_of(network, corrector, make_config(mode=mode, weight=0.0), perturbed=None)
    with pytest.raises(ValueError, match="corrector is None"):
        losses_of(network, None, config)
    corrected = make_config(mode="corrected", weight=0.0)
    with pytest.raises(ValueError, match="corrector is None"):
        losses_of(network, None, corrected)
    with pytest.raises(ValueError, match="corrector is None"):
        encode(network, None, input_ids_BS=INPUT_IDS, attention_mask_BS=MASK, config=corrected)
    with pytest.raises(ValueError, match="attention_mask_BS has shape"):
        losses_of(network, corrector, config, attention_mask_BS=MASK[:2])
    with pytest.raises(ValueError, match="perturbed has shape"):
        losses_of(network, corrector, config, perturbed=noise(config, INPUT_IDS[:2], MASK[:2]))
    with pytest.raises(ValueError, match="labels_BT has shape"):
        losses_of(network, corrector, config, labels_BT=LABELS[:2])
