"""space=update: the part of an expert's step that lies in the span of the other experts' accumulated changes.

Shapes: E experts, N experts of all ranks, J experts (the second of a pair), K values of one expert's flattened weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COLUMNS = 16384
"""Columns that are read at a time: with a few experts they stay in a core's cache between reads."""
BLOCK = 4096
"""Values of a dot product that are summed in the tensors' own precision; blocks are summed in float64."""


def dot_products(left_EK: Tensor, right_JK: Tensor) -> Tensor:
    """Dot products of every row with every row, accurate for rows of millions of values.

    Returns:
        (E, J) float64.

    Source: not in the paper.
    """
    whole = left_EK.shape[1] - left_EK.shape[1] % BLOCK
    left = left_EK[:, :whole].unflatten(1, (whole // BLOCK, BLOCK)).transpose(0, 1)
    right = right_JK[:, :whole].unflatten(1, (whole // BLOCK, BLOCK)).transpose(0, 1)
    rest_EJ = left_EK[:, whole:] @ right_JK[:, whole:].T
    return (left @ right.mT).sum(0, dtype=torch.float64) + rest_EJ


def others_coefficients(gram_EE: Tensor, overlap_EJ: Tensor, *, tolerance: float) -> Tensor:
    """How the projection of every step on the others' span is made up of their changes.

    Changes are scaled to length 1 first, so that small ones count like large ones; zero changes span nothing, and
    directions that only rounding tells apart are dropped.

    Args:
        gram_EE: Dot products of the changes with each other, float64.
        overlap_EJ: Dot products of the steps (E) with the changes (J), float64.
        tolerance: Smallest eigenvalue kept of the Gram matrix of scaled changes.

    Returns:
        (E, J) float64, zero on the diagonal: the projection of step e is the sum over j of entry (e, j) times change j.

    Source: our definition, update space (the paper's text gives none).
    """
    num_experts = gram_EE.shape[0]
    length_E = gram_EE.diagonal().sqrt()
    scale_E = torch.where(length_E > 0, 1 / length_E, 0)
    others_EJ = 1 - torch.eye(num_experts, dtype=gram_EE.dtype, device=gram_EE.device)
    cosine_EE = gram_EE * scale_E[:, None] * scale_E
    others_cosine_EJJ = cosine_EE * others_EJ[:, :, None] * others_EJ[:, None, :]
    values_EJ, vectors_EJJ = torch.linalg.eigh(others_cosine_EJJ)
    inverse_EJ = torch.where(values_EJ > tolerance, 1 / values_EJ, 0)
    target_EJ = overlap_EJ * scale_E * others_EJ
    along_EJ = (vectors_EJJ.mT @ target_EJ[:, :, None])[:, :, 0] * inverse_EJ
    return (vectors_EJJ @ along_EJ[:, :, None])[:, :, 0] * scale_E * others_EJ


def removed_by_span(step_EK: Tensor, change_NK: Tensor, *, own: slice = slice(None)) -> Tensor:
    """The part of every expert's step that lies in the span of the other experts' changes.

    Args:
        step_EK: Finished steps, flattened.
        change_NK: Accumulated changes W - W_0 before this step, flattened, in the dtype of the steps.
        own: Whose changes are those of the steps' experts, where these are not all.

    Returns:
        (E, K): the step less this is orthogonal to every other expert's change; zero where no other has changed.

    Source: our definition, update space (the paper's text gives none): "orthogonal to the subspace spanned by other
        experts", taken on the experts' own changes.
    """
    num_experts = len(change_NK)
    product = change_NK.new_zeros(2 * num_experts, num_experts, dtype=torch.float64)
    product[:num_experts] = dot_products(change_NK, change_NK)
    product[num_experts:][own] = dot_products(step_EK, change_NK)
    coefficients_NJ, _ = coefficients_of(product, num_experts, eps=torch.finfo(step_EK.dtype).eps)
    finite_NK = torch.where(coefficients_NJ.any(0)[:, None], change_NK, 0)
    return coefficients_NJ[own].to(step_EK.dtype) @ finite_NK


@dataclass(frozen=True, kw_only=True)
class WeightRows:
    """The weights of one linear around a step, one row per expert.

    Source: our definition, section 4 of the pseudo-code: W before and after U.
    """

    start_EK: Tensor
    """W_0; one row where that was the same for all."""
    rounding_E: Tensor
    """Squared length up to which a change is rounding of W_0 and spans nothing, float64; one where W_0 is one row."""
    before_EK: Tensor
    """Before the step, in float32 or wider; `project` overwrites it."""
    after: Sequence[Tensor]
    """After it: views of the model's own memory, (E, K) in one tensor or several with the rows of some experts each."""
    kept_shares: Sequence[float | None]
    """What decoupled decay left of the weights in each of them, 1 - lr * weight_decay; None where nothing stepped."""


def project(rows: WeightRows) -> Tensor:
    """Take out of the weights what the latest step added along the other experts' changes: `removed_by_span`, fast.

    Columns are read in blocks that stay in the processor's cache, twice: for the dot products, and to subtract.

    Args:
        rows: The weights of one linear.

    Returns:
        (E,) float64: the share of each step's squared length that was taken out.

    Source: as `removed_by_span`; the blocks are not in the paper.
    """
    num_experts, num_values = rows.before_EK.shape
    parts = [len(after) for after in rows.after]
    product = rows.before_EK.new_zeros(2 * num_experts, num_experts, dtype=torch.float64)
    step_energy_E = rows.before_EK.new_zeros(num_experts, dtype=torch.float64)
    buffer = rows.before_EK.new_empty(num_experts, min(COLUMNS, num_values))
    for first in range(0, num_values, COLUMNS):
        columns = slice(first, min(first + COLUMNS, num_values))
        step_EB, before_EB = buffer[:, : columns.stop - first], rows.before_EK[:, columns]
        pieces = zip(step_EB.split(parts), before_EB.split(parts), rows.after, rows.kept_shares, strict=True)
        for step_B, before_B, after, kept in pieces:
            if kept is None:
                step_B.zero_()
            elif after.dtype == step_B.dtype:
                torch.sub(after[:, columns], before_B, alpha=kept, out=step_B)
            else:
                step_B.copy_(after[:, columns]).sub_(before_B, alpha=kept)
        change_EB = before_EB.sub_(rows.start_EK[:, columns])
        product[:num_experts] += change_EB @ change_EB.T
        product[num_experts:] += step_EB @ change_EB.T
        step_energy_E += torch.linalg.vecdot(step_EB, step_EB)
    still_E = product[:num_experts].diagonal() <= rows.rounding_E
    product[:num_experts].masked_fill_(still_E[:, None] | still_E, 0)
    product[num_experts:].masked_fill_(still_E, 0)
    coefficients_EJ, energy_E = coefficients_of(product, num_experts, eps=torch.finfo(buffer.dtype).eps)
    _subtract(rows, coefficients_EJ.to(buffer.dtype), buffer)
    return torch.where(step_energy_E > 0, energy_E / step_energy_E, 0)


def _subtract(rows: WeightRows, coefficients_EJ: Tensor, buffer: Tensor) -> None:
    change_EK = rows.before_EK
    broken = ~coefficients_EJ.any(0)  # nobody's projection needs these changes, which may hold what is not a number
    if broken.any():
        change_EK[broken] = 0
    for first in range(0, change_EK.shape[1], COLUMNS):
        columns = slice(first, min(first + COLUMNS, change_EK.shape[1]))
        removed_EB = torch.mm(coefficients_EJ, change_EK[:, columns], out=buffer[:, : columns.stop - first])
        for after, removed_B in zip(rows.after, removed_EB.split([len(part) for part in rows.after]), strict=True):
            after[:, columns].sub_(removed_B)


def coefficients_of(product: Tensor, num_experts: int, *, eps: float) -> tuple[Tensor, Tensor]:
    """`others_coefficients` from the dot products of [changes, steps] with at least [changes].

    An expert whose change or step is not finite is left out: it spans nothing, and its own step stays as it is.

    Args:
        product: Dot products, float64; the first rows and columns are the changes.
        num_experts: E.
        eps: Of the dtype they were multiplied in.

    Returns:
        The coefficients (E, E), and the squared length (E,) of what they make.

    Source: as `others_coefficients`.
    """
    gram_EE, overlap_EJ = product[:num_experts, :num_experts], product[num_experts:, :num_experts]
    finite_E = gram_EE.diagonal().isfinite()
    finite_EE = finite_E[:, None] & finite_E
    gram_EE = torch.where(finite_EE, gram_EE, 0)
    overlap_EJ = torch.where(finite_E & overlap_EJ.isfinite(), overlap_EJ, 0)
    coefficients_EJ = others_coefficients(gram_EE, overlap_EJ, tolerance=num_experts * eps)
    return coefficients_EJ, (coefficients_EJ @ gram_EE * coefficients_EJ).sum(1)
