"""The objective L = L_seq + lambda (L_tok + L_pos) around any encoder-decoder network of the Hugging Face kind.

B  sentence
S  slot of the source
T  slot of the target
M  width of the encoder
V  id of the vocabulary
R  slot whose token is predicted
N  slot whose displacement is predicted
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bliss.config import BlissConfig
from bliss.corrector import Corrector
from bliss.generator import Perturbed
from bliss.losses import position_loss, sequence_loss, token_loss
from bliss.network import EncoderDecoder, EncoderOutputs, decode_target, encode_source
from bliss.rivals import Rival, rival_loss


@dataclass(frozen=True, kw_only=True, eq=False)
class BlissLosses:
    """The objective, its terms, and what shows whether the self-supervised task is learnt at all.

    Source: our definition (the paper's text gives none).
    """

    total: Tensor
    """0-d: L, the one to call backward() on."""

    sequence: Tensor
    """0-d: L_seq; in mode "both" the mean of the clean and the perturbed pass."""

    token: Tensor
    """0-d: L_tok; 0 where it is switched off or no slot counts."""

    position: Tensor
    """0-d: L_pos; 0 where it is switched off or no slot counts."""

    logits_BTV: Tensor
    """The decoder's logits; in mode "both" those of the clean pass."""

    accuracies: Mapping[str, Tensor] = field(default_factory=dict)
    """0-d each, in [0, 1]: `token` and `position`, each head's first choice over the slots that count, and
    `position_constant`, what always answering "not moved" would score; absent where no slot counts."""

    def logs(self) -> dict[str, float]:
        """Return the losses and accuracies as plain numbers; it waits for the device.

        The position head has learnt nothing while `accuracy_position` is no better than `accuracy_position_constant`.

        Source: not in the paper.
        """
        losses = {f"loss_{name}": getattr(self, name).item() for name in ("total", "sequence", "token", "position")}
        return losses | {f"accuracy_{name}": accuracy.item() for name, accuracy in self.accuracies.items()}


def bliss_losses(
    network: EncoderDecoder,
    corrector: Corrector | None,
    *,
    input_ids_BS: Tensor,
    attention_mask_BS: Tensor,
    labels_BT: Tensor,
    perturbed: Perturbed | None,
    config: BlissConfig,
    rival: Rival | None = None,
) -> BlissLosses:
    """Compute the objective on one batch.

    With weight 0 the self-supervised task is not run: mode "clean" is then plain training bit for bit (loss, gradients,
    random numbers consumed) and mode "perturbed" plain noising. The decoder runs before the corrector and, in mode
    "clean", before the perturbed pass, so dropout leaves L_seq the same for every weight.
    For a validation loss on clean input use mode="clean" with weight=0.

    Args:
        network: The encoder-decoder network.
        corrector: The corrector; may be None where the weight is 0, except in mode "corrected".
        input_ids_BS: int64 (B, S), the clean source.
        attention_mask_BS: (B, S), 0 for padding.
        labels_BT: int64 (B, T), the target; -100 is ignored.
        perturbed: What `perturb` made of the source; may be None in mode "clean" where the weight is 0.
        config: The method's choices.
        rival: A method whose loss takes the place of L_seq wherever the decoder reads the encoder; None for none.

    Returns:
        The objective, its terms and the decoder's logits.

    Raises:
        ValueError: An argument that the config needs is missing, shapes disagree, or the rival cannot go with the mode.

    Source: our definition (the paper's text gives none); the two supervisions are those of the abstract.
    """
    _check_needs(corrector, perturbed, config, rival)
    _check_batch(input_ids_BS, attention_mask_BS, labels_BT, perturbed)
    losses, logits, z_BSM = _sequence_losses(
        network, corrector, input_ids_BS, attention_mask_BS, labels_BT, perturbed, config=config, rival=rival
    )
    token = position = torch.zeros((), device=input_ids_BS.device)
    accuracies: dict[str, Tensor] = {}
    if corrector is not None and perturbed is not None and z_BSM is not None and config.weight > 0:
        embedding_VM = network.get_input_embeddings().weight
        batch = (input_ids_BS, attention_mask_BS, perturbed)
        token, position, accuracies = _restoration(corrector, z_BSM, embedding_VM, *batch, config=config)
    sequence = torch.stack(losses).mean()
    return BlissLosses(
        total=sequence + config.weight * (token + position),
        sequence=sequence,
        token=token,
        position=position,
        logits_BTV=logits[0],
        accuracies=accuracies,
    )


def encode(
    network: EncoderDecoder,
    corrector: Corrector | None,
    *,
    input_ids_BS: Tensor,
    attention_mask_BS: Tensor,
    config: BlissConfig,
) -> EncoderOutputs:
    """Return what the decoder reads at inference, to pass to `generate(encoder_outputs=..., attention_mask=...)`.

    Args:
        network: The encoder-decoder network.
        corrector: The corrector; read in mode "corrected" only, and may be None otherwise.
        input_ids_BS: int64 (B, S), the source as it is.
        attention_mask_BS: (B, S), 0 for padding.
        config: The method's choices.

    Returns:
        The encoder's own outputs; in mode "corrected" a record of the same type that holds the corrected states.

    Raises:
        ValueError: The corrector is missing in mode "corrected".

    Source: our definition (the paper's text gives none).
    """
    outputs = encode_source(network, input_ids_BS, attention_mask_BS)
    if config.mode != "corrected":
        return outputs
    if corrector is None:
        raise ValueError("corrector is None; mode='corrected' reads its states at inference too: pass the trained one")
    make_outputs: Callable[..., EncoderOutputs] = type(outputs)
    return make_outputs(last_hidden_state=corrector(outputs.last_hidden_state, attention_mask_BS))


def _sequence_losses(
    network: EncoderDecoder,
    corrector: Corrector | None,
    input_ids_BS: Tensor,
    attention_mask_BS: Tensor,
    labels_BT: Tensor,
    perturbed: Perturbed | None,
    *,
    config: BlissConfig,
    rival: Rival | None,
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """L_seq and logits of every pass whose states the decoder reads, and the corrected states where they are needed."""
    batch = {"attention_mask_BS": attention_mask_BS, "labels_BT": labels_BT}

    def supervised(ids_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if rival is not None:
            smoothing = config.label_smoothing
            return rival_loss(network, rival, input_ids_BS=ids_BS, **batch, label_smoothing=smoothing)
        states_BSM = encode_source(network, ids_BS, attention_mask_BS).last_hidden_state
        return *read(states_BSM), states_BSM

    def read(states_BSM: Tensor) -> tuple[Tensor, Tensor]:
        decoder_input_ids_BT = network.prepare_decoder_input_ids_from_labels(labels_BT)
        logits_BTV = decode_target(network, states_BSM, attention_mask_BS, decoder_input_ids_BT)
        return sequence_loss(logits_BTV, labels_BT, label_smoothing=config.label_smoothing), logits_BTV

    passes = [supervised(input_ids_BS)[:2]] if config.mode in ("clean", "both") else []
    z_BSM = None
    if perturbed is not None and (config.mode != "clean" or config.weight > 0):
        if config.mode in ("perturbed", "both"):
            *noisy, states_BSM = supervised(perturbed.input_ids_BS)
            passes.append((noisy[0], noisy[1]))
        else:
            states_BSM = encode_source(network, perturbed.input_ids_BS, attention_mask_BS).last_hidden_state
        if corrector is not None and (config.mode == "corrected" or config.weight > 0):
            z_BSM = corrector(states_BSM, attention_mask_BS)
            if config.mode == "corrected":
                passes.append(read(z_BSM))
    return [loss for loss, _ in passes], [logits_BTV for _, logits_BTV in passes], z_BSM


def _restoration(
    corrector: Corrector,
    z_BSM: Tensor,
    embedding_VM: Tensor,
    input_ids_BS: Tensor,
    attention_mask_BS: Tensor,
    perturbed: Perturbed,
    *,
    config: BlissConfig,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """L_tok, L_pos and the accuracies; only the states of slots that count meet the vocabulary."""
    real_BS = attention_mask_BS != 0
    displacement_BS = perturbed.source_slot_BS - torch.arange(input_ids_BS.shape[1], device=input_ids_BS.device)
    if config.target == "two_heads":
        targets_BS, changed_BS = input_ids_BS.gather(1, perturbed.source_slot_BS), perturbed.replaced_BS
    else:
        targets_BS, changed_BS = input_ids_BS, perturbed.replaced_BS | (displacement_BS != 0)

    counted_BS = changed_BS if config.token_slots == "replaced" else real_BS  # noqa: S105
    token_logits_RV = corrector.token_logits(z_BSM[counted_BS], embedding_VM)
    targets_R = targets_BS[counted_BS]
    token = token_loss(token_logits_RV, targets_R)
    hits = {"token": token_logits_RV.argmax(-1) == targets_R}

    position = torch.zeros_like(token)
    if config.target == "two_heads":
        position_logits_ND = corrector.position_logits(z_BSM[real_BS])
        displacement_N = displacement_BS[real_BS].clamp(-config.max_displacement, config.max_displacement)
        position = position_loss(
            position_logits_ND,
            displacement_N,
            max_displacement=config.max_displacement,
            temperature=config.temperature,
        )
        hits["position"] = position_logits_ND.argmax(-1) - config.max_displacement == displacement_N
        hits["position_constant"] = displacement_N == 0
    return token, position, {name: flags.float().mean() for name, flags in hits.items() if len(flags)}


def _check_batch(
    input_ids_BS: Tensor, attention_mask_BS: Tensor, labels_BT: Tensor, perturbed: Perturbed | None
) -> None:
    shape = tuple(input_ids_BS.shape)
    expected = {"attention_mask_BS": attention_mask_BS}
    if perturbed is not None:
        expected["perturbed"] = perturbed.input_ids_BS
    for name, tensor in expected.items():
        if tensor.shape != input_ids_BS.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and input_ids_BS {shape}; they must agree: pass what belongs "
                f"to this batch"
            )
    if labels_BT.ndim != 2 or len(labels_BT) != len(input_ids_BS):
        raise ValueError(
            f"labels_BT has shape {tuple(labels_BT.shape)}; it must be ({len(input_ids_BS)}, target slots): pad the "
            f"targets of this batch with -100"
        )


def _check_needs(
    corrector: Corrector | None, perturbed: Perturbed | None, config: BlissConfig, rival: Rival | None
) -> None:
    why = f"mode={config.mode!r} with weight={config.weight} needs one"
    if perturbed is None and (config.mode != "clean" or config.weight > 0):
        raise ValueError(f"perturbed is None; {why}: pass perturb(...) of this batch")
    if corrector is None and (config.mode == "corrected" or config.weight > 0):
        raise ValueError(f"corrector is None; {why}: pass a Corrector, or set weight to 0")
    if rival is not None and config.mode not in rival.config.modes:
        raise ValueError(
            f"rival is {rival.config.kind!r} and config.mode={config.mode!r}; it goes with the modes "
            f"{', '.join(rival.config.modes)}: use one of these, or no rival"
        )
