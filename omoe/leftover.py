"""How much of a finished step still lies in the other experts' subspace, whatever took out what it did.

A mean of projectors is no projector: directions that one of the other experts alone uses are hardly touched. So the
share that is left is measured, against the span of the others' changes (space=update), or against the projector of the
union of all others (space=input), which is that onto the complement of their mean inputs' span as alpha goes to 0.

Shapes: E experts of this rank, N experts of all ranks, O output features, I input features, K = O * I.
"""

import torch
from torch import Tensor

from omoe.config import OMoEConfig
from omoe.low_rank import factors
from omoe.projector import complements
from omoe.spread import ExpertGroup
from omoe.state import LinearState
from omoe.subspace import removed_by_span

INVERTIBLE = 1e-6
"""Added to the eigenvalues of projectors, which float32 may round to below zero; measures are as exact as this."""


def left_in_changes(kept_EK: Tensor, change_NK: Tensor, *, own: slice = slice(None)) -> Tensor:
    """Length of the finished steps' part in the span of the others' changes, relative to the steps' length.

    Args:
        kept_EK: What the steps added to the weights, decoupled decay apart.
        change_NK: Accumulated changes before the steps.
        own: Whose changes are those of the steps' experts, where these are not all.

    Returns:
        (E,) float64 in [0, 1]; 0 for no step.

    Source: our definition, section 4.2, hazard 1: log the leftover share.
    """
    return _share(removed_by_span(kept_EK, change_NK, own=own), kept_EK)


def left_in_inputs(kept_EOI: Tensor, state: LinearState, config: OMoEConfig, *, ranks: ExpertGroup) -> Tensor:
    """Length of what the projector of the union of all others would still take out, relative to the steps' length.

    Args:
        kept_EOI: What the steps added to the weights, decoupled decay apart.
        state: The projectors that the steps were projected by.
        config: How they were made.
        ranks: Who shares the experts.

    Returns:
        (E,) float64 in [0, 1]; 0 for no step.

    Source: our definition, section 4.2, hazard 1: log the leftover share, for any form beside that of the union.
    """
    if config.side == "output":
        kept_EOI = kept_EOI.mT
    if config.rank is not None:
        left_EOI = _left_by_columns(kept_EOI.double(), state, config, ranks)
    else:
        left_EOI = kept_EOI.double() @ others_complements(state, config, ranks=ranks)
    return _share(left_EOI.flatten(1), kept_EOI.flatten(1))


def others_complements(state: LinearState, config: OMoEConfig, *, ranks: ExpertGroup) -> Tensor:
    """I - P of the union of all other experts' mean inputs, from every expert's own exact projector.

    As P = (I + A A^T / alpha)^-1, inverses less the identity add up to what the others have taken in together.

    Returns:
        (E, I, I) float64; nan where projectors are not positive.

    Source: our definition, section 4.1 (projector of the union), from the closed form of section 3.
    """
    if config.combine == "union":
        return complements(state["projector_EII"].double())
    projector_EII = state["projector_EII"].double()
    identity_II = torch.eye(projector_EII.shape[1], dtype=torch.float64, device=projector_EII.device)
    root_EII, failed_E = torch.linalg.cholesky_ex(projector_EII + INVERTIBLE * identity_II)
    taken_EII = torch.cholesky_inverse(root_EII) - identity_II
    taken_EII[failed_E > 0] = torch.nan
    others_EII = ranks.total(taken_EII.sum(0)) - taken_EII
    return torch.linalg.solve(identity_II + others_EII, others_EII)


def _left_by_columns(kept_EOI: Tensor, state: LinearState, config: OMoEConfig, ranks: ExpertGroup) -> Tensor:
    columns_EIW = state["columns_EIW"].double()
    if config.combine == "union":
        factor_EIW = factors(columns_EIW, alpha=config.alpha)
        return (kept_EOI @ factor_EIW) @ factor_EIW.mT
    columns_NIW = ranks.gather(columns_EIW)
    left = []
    for kept_OI, expert in zip(kept_EOI, range(len(columns_NIW))[ranks.own(len(kept_EOI))], strict=True):
        others_IW = torch.cat([*columns_NIW[:expert], *columns_NIW[expert + 1 :]], dim=1)
        (factor_IW,) = factors(others_IW[None], alpha=config.alpha)
        left.append((kept_OI @ factor_IW) @ factor_IW.T)
    return torch.stack(left)


def _share(left_EK: Tensor, kept_EK: Tensor) -> Tensor:
    left_E, kept_E = (torch.linalg.vector_norm(value.double(), dim=1) for value in (left_EK, kept_EK))
    return torch.where(kept_E > 0, left_E / kept_E, 0)
