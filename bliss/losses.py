"""The loss terms: means over what counts, in float32, and 0 where nothing counts.

B  sentence
T  slot of the target
V  id of the vocabulary
R  slot whose token is predicted
N  slot whose displacement is predicted
D  displacement class, -K' to K'
"""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 -- the name everyone uses

IGNORED_LABEL = -100
ONE_HOT_TEMPERATURE = 1e-30  # colder makes no difference: exp(-1e30) is 0


def sequence_loss(logits_BTV: Tensor, labels_BT: Tensor, *, label_smoothing: float) -> Tensor:
    """Label-smoothed cross entropy per target token, L_seq.

    Args:
        logits_BTV: (B, T, V), the decoder's logits.
        labels_BT: int64 (B, T), the target; -100 is ignored.
        label_smoothing: Probability mass spread over the vocabulary.

    Returns:
        The mean, 0-d.

    Source: our definition (the paper's text gives none).
    """
    labels = labels_BT.flatten()
    logits = logits_BTV.flatten(0, 1).float()
    total = F.cross_entropy(
        logits, labels, ignore_index=IGNORED_LABEL, label_smoothing=label_smoothing, reduction="sum"
    )
    return total / (labels != IGNORED_LABEL).sum().clamp(min=1)


def token_loss(logits_RV: Tensor, targets_R: Tensor) -> Tensor:
    """Cross entropy per slot that counts, L_tok.

    Args:
        logits_RV: (R, V), the token head's logits.
        targets_R: int64 (R,), the original tokens.

    Returns:
        The mean, 0-d.

    Source: our definition (the paper's text gives none).
    """
    return F.cross_entropy(logits_RV.float(), targets_R, reduction="sum") / max(len(targets_R), 1)


def position_targets(displacement_N: Tensor, *, max_displacement: int, temperature: float) -> Tensor:
    """Soft target q(d) in proportion to exp(-|d - d_j| / tau) over the displacements -K' to K'.

    Args:
        displacement_N: int64 (N,), how many slots each token came from, pi(j) - j; clipped to [-K', K'].
        max_displacement: K', in slots.
        temperature: tau, in slots; 0 gives a one-hot target.

    Returns:
        float32 (N, 2 K' + 1); each row sums to 1.

    Source: our definition (the paper's text gives none).
    """
    classes_D = torch.arange(-max_displacement, max_displacement + 1, device=displacement_N.device)
    clipped_N = displacement_N.clamp(-max_displacement, max_displacement)
    distance_ND = (classes_D - clipped_N[:, None]).abs()
    return (distance_ND / -max(temperature, ONE_HOT_TEMPERATURE)).softmax(1)


def position_loss(logits_ND: Tensor, displacement_N: Tensor, *, max_displacement: int, temperature: float) -> Tensor:
    """Cross entropy against the soft target per slot that counts, L_pos.

    Args:
        logits_ND: (N, 2 K' + 1), the position head's logits.
        displacement_N: int64 (N,), how many slots each token came from, pi(j) - j.
        max_displacement: K', in slots.
        temperature: tau, in slots; 0 gives a one-hot target.

    Returns:
        The mean, 0-d.

    Source: our definition (the paper's text gives none).
    """
    targets_ND = position_targets(displacement_N, max_displacement=max_displacement, temperature=temperature)
    return F.cross_entropy(logits_ND.float(), targets_ND, reduction="sum") / max(len(displacement_N), 1)
