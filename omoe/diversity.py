"""How different experts are: of their outputs on one held-out batch sent to all of them, and of their weights' changes.

All in float64: long float32 dot products read a cosine about 0.001 low. At step 0, where experts are copies, cosines of
outputs are exactly 1, the variation exactly 0, and cosines of changes undefined (nan).

Shapes: E experts, T tokens of the held-out batch, M output width, O output features, I input features, N values.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def expert_outputs(experts: Callable[[Tensor, Sequence[int]], Tensor], h_TM: Tensor, *, num_experts: int) -> Tensor:
    """Send one batch to every expert.

    Args:
        experts: Called as experts(rows, counts), the rows sorted by expert, like the stacked experts of a layer; once
            per expert, so that all rows lie alike in memory and copies give the same bits.
        h_TM: The held-out batch, at least one token.
        num_experts: E.

    Returns:
        (E, T, M) in the experts' dtype.

    Raises:
        ValueError: The batch is empty, or the experts did not return one row per row.

    Source: our definition, section 6.
    """
    num_tokens = h_TM.shape[0]
    if num_tokens == 0:
        raise ValueError("h_TM is empty: give at least one token")
    counts_EE = (num_tokens * torch.eye(num_experts, dtype=torch.int64)).tolist()
    output_ETM = torch.stack([experts(h_TM, counts_E) for counts_E in counts_EE])
    if output_ETM.ndim != 3 or output_ETM.shape[1] != num_tokens:
        raise ValueError(
            f"experts returned shape {tuple(output_ETM.shape[1:])} for {num_tokens} rows: expected one each"
        )
    return output_ETM


def output_cosine(output_ETM: Tensor, *, centred: bool = False) -> Tensor:
    """Cosine of every two experts' outputs for the same token, averaged over tokens.

    Args:
        output_ETM: From `expert_outputs`.
        centred: Take every expert's mean over tokens off first, for a large common mean pushes any cosine towards 1.

    Returns:
        (E, E) float64, 1 on the diagonal; nan where an output is zero.

    Source: our definition, section 6, measure 1 (the full matrix; see `mean_pairwise`).
    """
    output_ETM = output_ETM.double()
    return _cosine_EET(output_ETM - output_ETM.mean(1, keepdim=True) if centred else output_ETM).mean(2)


def variation(output_ETM: Tensor) -> Tensor:
    """Variance across experts, averaged over tokens, relative to the mean squared norm: 0 for copies.

    Args:
        output_ETM: From `expert_outputs`.

    Returns:
        A float64 scalar; nan where all outputs are zero.

    Source: our definition, section 6, measure 2.
    """
    output_ETM = output_ETM.double()
    apart_ETM = output_ETM - output_ETM[:1]  # the variance is the same, and exactly zero for copies
    variance = (apart_ETM - apart_ETM.mean(0)).square().sum(2).mean()
    return variance / output_ETM.square().sum(2).mean()


def change_cosine(weight_EOI: Tensor, start_EOI: Tensor) -> Tensor:
    """Cosine of every two experts' changes W - W_0 since their start.

    Args:
        weight_EOI: Weights now, see `stacked_EOI`.
        start_EOI: Weights at the start.

    Returns:
        (E, E) float64; nan where an expert has not changed.

    Source: our definition, section 6, measure 3 (the full matrix; see `mean_pairwise`).
    """
    change_EOI = weight_EOI.detach().double() - start_EOI.double()
    return _cosine_EET(change_EOI.flatten(1)[:, None])[:, :, 0]


def change_size(weight_EOI: Tensor, start_EOI: Tensor) -> Tensor:
    """Norm of every expert's change W - W_0 relative to its start; to be read beside any cosine.

    Returns:
        (E,) float64.

    Source: our definition, section 13: similarities near 0.99 appear when experts move little.
    """
    start_EN = start_EOI.double().flatten(1)
    return (weight_EOI.detach().double().flatten(1) - start_EN).norm(dim=1) / start_EN.norm(dim=1)


def mean_pairwise(cosine_EE: Tensor) -> Tensor:
    """Mean over all pairs of different experts.

    Returns:
        A scalar.

    Raises:
        ValueError: There is no pair.

    Source: our definition, section 6: (2 / (E (E - 1))) times the sum over i < j.
    """
    num_experts = cosine_EE.shape[0]
    if num_experts < 2:
        raise ValueError(f"cosine_EE is of {num_experts} expert: a pair needs at least 2")
    first, second = torch.triu_indices(num_experts, num_experts, offset=1, device=cosine_EE.device)
    return cosine_EE[first, second].mean()


def _cosine_EET(value_ETN: Tensor) -> Tensor:  # noqa: N802 (shape letters)
    """Cosines over the last dimension. All dot products sum in the same order, so copies have exactly 1."""
    dot_EET = torch.stack([(row_TN * value_ETN).sum(2) for row_TN in value_ETN])
    square_ET = dot_EET.diagonal().T
    return dot_EET / (square_ET[:, None] * square_ET).sqrt()
