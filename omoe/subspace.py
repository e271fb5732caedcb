"""space=update: the part of an expert's step that lies in the span of the other experts' accumulated changes.

Shapes: E experts, J experts (the second of a pair), K values of one expert's flattened weight.
"""

import torch
from torch import Tensor

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


def removed_by_span(step_EK: Tensor, change_EK: Tensor, *, out_EK: Tensor | None = None) -> Tensor:
    """The part of every expert's step that lies in the span of the other experts' changes.

    Args:
        step_EK: Finished steps, flattened.
        change_EK: Accumulated changes W - W_0 before this step, flattened, in the dtype of the steps.
        out_EK: Where to write the result; may be step_EK.

    Returns:
        (E, K): the step less this is orthogonal to every other expert's change; zero where no other has changed.

    Source: our definition, update space (the paper's text gives none): "orthogonal to the subspace spanned by other
        experts", taken on the experts' own changes.
    """
    tolerance = change_EK.shape[0] * torch.finfo(change_EK.dtype).eps
    gram_EE = dot_products(change_EK, change_EK)
    overlap_EJ = dot_products(step_EK, change_EK)
    coefficients_EJ = others_coefficients(gram_EE, overlap_EJ, tolerance=tolerance)
    return torch.mm(coefficients_EJ.to(change_EK.dtype), change_EK, out=out_EK)
