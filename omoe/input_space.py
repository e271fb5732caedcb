"""space=input: an expert linear's projectors, exact or of low rank, applied to steps and refreshed from mean inputs.

With side=output the same is done to the transposed step, with mean outputs: O and I below change places.

Shapes: E experts of this rank, N experts of all ranks, O output features, I input features.
"""

import dataclasses

import torch
from torch import Tensor

from omoe.config import OMoEConfig
from omoe.control import rotation
from omoe.inputs import MeanInput
from omoe.low_rank import appended, error_bound, factors, removed_by_factors
from omoe.projector import (
    SYMMETRISE_EVERY,
    complements,
    forgotten,
    others_share,
    refreshed,
    removed_by_others,
    removed_by_product,
    seen_means,
    symmetrised,
    trace_share,
)
from omoe.spread import ExpertGroup
from omoe.state import LinearState


def removed(step_EOI: Tensor, state: LinearState, config: OMoEConfig, *, ranks: ExpertGroup, seed: int = 0) -> Tensor:
    """What an orthogonal step takes out of the base optimizer's, or what the control takes out instead.

    Args:
        step_EOI: The finished steps of this rank's experts.
        state: Of the linear.
        config: How the others' projector is made.
        ranks: Who shares the experts.
        seed: Of the random control.

    Returns:
        (E, O, I).

    Source: our definition, section 4, item 4.
    """
    if config.side == "output":
        step_EOI = step_EOI.mT
    removed_EOI = _removed_by(step_EOI, state, config, ranks, seed)
    return removed_EOI.mT if config.side == "output" else removed_EOI


def _removed_by(step_EOI: Tensor, state: LinearState, config: OMoEConfig, ranks: ExpertGroup, seed: int) -> Tensor:
    if config.control == "random":
        order_I, sign_I = rotation(step_EOI.shape[2], seed=seed, like=step_EOI)
        turned_EOI = _removed(step_EOI[:, :, order_I] * sign_I, state, config, ranks)
        return (turned_EOI * sign_I)[:, :, order_I.argsort()]
    return _removed(step_EOI, state, config, ranks)


def _removed(step_EOI: Tensor, state: LinearState, config: OMoEConfig, ranks: ExpertGroup) -> Tensor:
    tokens_N = ranks.gather(state["num_tokens_E"])
    own = ranks.own(len(step_EOI))
    if config.rank is None:
        if config.control == "own":
            return step_EOI @ complements(state["projector_EII"]).to(step_EOI.dtype)
        if config.combine == "product":
            complement_NII = ranks.gather(complements(state["projector_EII"])).to(step_EOI.dtype)
            return removed_by_product(step_EOI, [(taken,) for taken in complement_NII], own=own)
        return removed_by_others(step_EOI, state["projector_EII"], tokens_N, combine=config.combine, ranks=ranks)
    factor_EIW = factors(state["columns_EIW"], alpha=config.alpha).to(step_EOI.dtype)
    if config.control == "own" or config.combine == "union":
        return (step_EOI @ factor_EIW) @ factor_EIW.mT
    if config.combine == "product":
        factor_NIW = ranks.gather(factor_EIW)
        return removed_by_product(step_EOI, [(factor_IW, factor_IW.T) for factor_IW in factor_NIW], own=own)
    share_NN = others_share(tokens_N, combine=config.combine)
    return removed_by_factors(step_EOI, ranks.gather(factor_EIW), share_NN[own])


def refresh(state: LinearState, taken: MeanInput, config: OMoEConfig, *, ranks: ExpertGroup, num_steps: int) -> None:
    """Let the projectors take in the mean inputs of a step; one that is not finite counts as none.

    Args:
        state: Of the linear; its tensors are replaced.
        taken: What this rank's experts saw.
        config: OWM's constant, and how the others' projector is made.
        ranks: Who shares the experts; for the union, mean inputs travel.
        num_steps: Steps, this one included.

    Source: our definition, section 4, the last loop of the pseudo-code.
    """
    own = ranks.own(len(taken.mean_EI))
    finite_E = taken.mean_EI.isfinite().all(1)
    mean_EI = torch.where(finite_E[:, None], taken.mean_EI, 0)
    if config.alpha_steps is not None:  # a smaller alpha is a longer input: r r^T / alpha is all that counts
        mean_EI = mean_EI * (config.alpha / config.alpha_at(num_steps - 1)) ** 0.5
    mean_NI = ranks.gather(mean_EI) if config.combine == "union" else mean_EI
    seen_EIM = seen_means(mean_NI, combine=config.combine)
    if config.combine == "union":
        seen_EIM = seen_EIM[own]
    state["num_tokens_E"] = state["num_tokens_E"] + taken.num_tokens_E * finite_E
    if config.rank is None:
        projector_EII = forgotten(state["projector_EII"], share=config.forgetting)
        state["projector_EII"] = refreshed(projector_EII, seen_EIM, alpha=config.alpha)
        if num_steps % SYMMETRISE_EVERY == 0:
            state["projector_EII"] = symmetrised(state["projector_EII"])
        return
    columns_EIW, filled, dropped_E = appended(
        state["columns_EIW"], int(state["filled"]), state["dropped_E"], seen_EIM, rank=config.rank
    )
    state |= {"columns_EIW": columns_EIW, "filled": torch.tensor(filled), "dropped_E": dropped_E}


def others_trace(state: LinearState, config: OMoEConfig, *, ranks: ExpertGroup) -> Tensor:
    """trace(Q) / d of every expert of all ranks, (N,) float64.

    Source: our definition, section 4.2.
    """
    if config.combine == "product":
        trace_E = _product_trace(state, config, ranks)
    elif config.rank is None:
        trace_E = state["projector_EII"].diagonal(dim1=1, dim2=2).double().mean(1)
    else:
        factor_EIW = factors(state["columns_EIW"], alpha=config.alpha).double()
        trace_E = 1 - factor_EIW.square().sum((1, 2)) / factor_EIW.shape[1]
    return trace_share(ranks.gather(trace_E), ranks.gather(state["num_tokens_E"]), combine=config.combine)


def _product_trace(state: LinearState, config: OMoEConfig, ranks: ExpertGroup) -> Tensor:
    kept = state["projector_EII" if config.rank is None else "columns_EIW"]
    identity_EII = torch.eye(kept.shape[1], device=kept.device).repeat(len(kept), 1, 1)
    taken_EII = _removed(identity_EII, state, dataclasses.replace(config, control="none"), ranks)
    return 1 - taken_EII.diagonal(dim1=1, dim2=2).double().mean(1)


def rank_error(state: LinearState, config: OMoEConfig) -> Tensor:
    """How far each expert's I - P can be from the exact one, in operator norm; 0 for the exact form.

    Source: our definition; see low_rank.error_bound.
    """
    if config.rank is None:
        return torch.zeros(len(state["num_tokens_E"]), dtype=torch.float64)
    return error_bound(state["dropped_E"], alpha=config.alpha)
