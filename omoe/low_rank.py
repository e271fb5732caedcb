"""space=input, cheaply: what projectors take out as a few columns instead of a square matrix.

An expert's projector is P = I - A (A^T A + alpha)^-1 A^T with all mean inputs seen so far as the columns of A. Columns
are kept as they come; when there are too many, they are replaced by the `rank` largest singular directions of A, scaled
by their singular values, and the rest is dropped. What was dropped is summed up, for it bounds the error.

Shapes: E experts, J experts (the second of a pair), O output features, I input features, W columns, M new columns.
"""

import torch
from torch import Tensor

LEAST_ROOM = 8
RAISES = 4
"""How often a matrix is raised that rounding has made negative, by 16 times as much each time."""


def num_columns(rank: int) -> int:
    """Columns that are kept between two truncations: `rank`, and room for a quarter more.

    Source: our definition, section 9 (ways out: low-rank P).
    """
    return rank + max(LEAST_ROOM, rank // 4)


def appended(
    columns_EIW: Tensor, filled: int, dropped_E: Tensor, seen_EIM: Tensor, *, rank: int
) -> tuple[Tensor, int, Tensor]:
    """The columns with new mean inputs among them.

    Args:
        columns_EIW: Room for `num_columns(rank)`, of which the first `filled` are in use.
        filled: How many are.
        dropped_E: Squared length dropped so far, float64.
        seen_EIM: New mean inputs; zero columns change nothing.
        rank: Columns that a truncation leaves.

    Returns:
        Columns, how many are in use, and what was dropped; new tensors where they differ.

    Source: our definition, section 13: streaming truncation.
    """
    num_new, room = seen_EIM.shape[2], columns_EIW.shape[2]
    if filled + num_new <= room:
        columns_EIW[:, :, filled : filled + num_new] = seen_EIM
        return columns_EIW, filled + num_new, dropped_E
    all_EIW = torch.cat([columns_EIW[:, :, :filled], seen_EIM], dim=2)
    values_EW, vectors_EWW = torch.linalg.eigh((all_EIW.mT @ all_EIW).double())
    kept_EWW = vectors_EWW[:, :, -rank:].to(all_EIW.dtype)
    columns_EIW = torch.zeros_like(columns_EIW)
    columns_EIW[:, :, :rank] = all_EIW @ kept_EWW
    return columns_EIW, rank, dropped_E + values_EW[:, -rank - 1].clamp(min=0)


def factors(columns_EIW: Tensor, *, alpha: float) -> Tensor:
    """F with I - P = F F^T.

    Args:
        columns_EIW: From `appended`.
        alpha: OWM's constant.

    Returns:
        (E, I, W).

    Source: OWM (arXiv:1810.01256) in closed form; see projector.refreshed.
    """
    inner_EWW = columns_EIW.mT @ columns_EIW
    inner_EWW.diagonal(dim1=1, dim2=2).add_(alpha)
    root_EWW = positive_root(inner_EWW, columns_EIW.square().sum((1, 2)))
    return torch.linalg.solve_triangular(root_EWW.mT, columns_EIW, upper=True, left=False)


def positive_root(inner_EWW: Tensor, size_E: Tensor) -> Tensor:
    """Cholesky factors of Gram matrices plus alpha, which rounding may have left below zero where alpha is too small.

    There alpha is taken to be what the dtype holds beside the columns' length.

    Args:
        inner_EWW: The matrices, positive but for rounding.
        size_E: Squared length of the columns they were made of.

    Raises:
        RuntimeError: A matrix is negative by more than rounding.

    Source: not in the paper.
    """
    for power in range(1, RAISES + 1):
        root_EWW, failed_E = torch.linalg.cholesky_ex(inner_EWW)
        if not failed_E.any():
            return root_EWW
        least_E = torch.where(failed_E > 0, torch.finfo(inner_EWW.dtype).eps * 16.0**power * size_E, 0)
        inner_EWW = inner_EWW + torch.diag_embed(least_E[:, None].expand(inner_EWW.shape[:2]))
    return torch.linalg.cholesky(inner_EWW)


def removed_by_factors(step_EOI: Tensor, factor_JIW: Tensor, share_EJ: Tensor) -> Tensor:
    """What the others' projectors take out of every expert's step: sum over j of share * U F_j F_j^T.

    Args:
        step_EOI: Finished steps.
        factor_JIW: From `factors`, of all experts.
        share_EJ: How much of each expert's projector; a row per step.

    Returns:
        (E, O, I).

    Source: our definition, section 4, item 2.
    """
    flat_IJW = factor_JIW.transpose(0, 1).flatten(1)
    along_EOJ = step_EOI @ flat_IJW
    weight_EJW = share_EJ.to(step_EOI.dtype).repeat_interleave(factor_JIW.shape[2], dim=1)
    return (along_EOJ * weight_EJW[:, None]) @ flat_IJW.T


def error_bound(dropped_E: Tensor, *, alpha: float) -> Tensor:
    """How far F F^T can be from the exact I - P, in operator norm.

    With A A^T = C C^T + D and 0 <= D <= dropped, both are f(x) = x / (x + alpha) of a matrix; f is operator monotone
    with f(0) = 0, so that they differ by at most f(dropped) (Ando's inequality).

    Returns:
        (E,) float64, below 1.

    Source: our definition; not in the paper.
    """
    return dropped_E / (dropped_E + alpha)
