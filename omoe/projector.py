"""space=input: projectors that take the directions of experts' mean inputs out of a weight's step.

P takes an expert's own mean inputs out, Q those of the other experts; I - Q, what a step loses, is what is computed,
since it is exactly zero as long as no input was seen.

Shapes: E experts of this rank, N experts of all ranks, J experts (the second of a pair), O output features,
I input features, M mean inputs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from omoe.config import Combine
from omoe.spread import ExpertGroup

ALONE = ExpertGroup()
SYMMETRISE_EVERY = 1000
"""Steps after which a projector is made symmetric again."""


def seen_means(mean_EI: Tensor, *, combine: Combine) -> Tensor:
    """The mean inputs that every expert's projector takes in: its own, or those of all the others for the union.

    Args:
        mean_EI: Mean inputs of this step; zero for an expert without tokens.
        combine: How the others' projector is made.

    Returns:
        (E, I, M): E - 1 means for "union", else 1.

    Source: OWM (arXiv:1810.01256) for own inputs; the union is our definition, section 4.1.
    """
    if combine != "union":
        return mean_EI[:, :, None]
    num_experts = mean_EI.shape[0]
    others = [[other for other in range(num_experts) if other != expert] for expert in range(num_experts)]
    return mean_EI[torch.tensor(others, device=mean_EI.device)].transpose(1, 2)


def refreshed(projector_EII: Tensor, seen_EIM: Tensor, *, alpha: float) -> Tensor:
    """OWM's recursion for several mean inputs at once: P - K (alpha + R^T K)^-1 K^T with K = P R.

    From the identity, and for any order of the inputs, it gives P = I - A (A^T A + alpha)^-1 A^T, with all mean inputs
    seen so far as the columns of A. A zero column changes nothing.

    Args:
        projector_EII: Projectors before, symmetric.
        seen_EIM: Mean inputs R to take in.
        alpha: OWM's constant, in squared units of a mean input.

    Raises:
        RuntimeError: Rounding is larger than alpha beside such inputs.

    Source: OWM (arXiv:1810.01256), recursion (M = 1); the block form is the same identity of Woodbury.
    """
    gain_EIM = projector_EII @ seen_EIM
    inner_EMM = seen_EIM.mT @ gain_EIM
    inner_EMM.diagonal(dim1=1, dim2=2).add_(alpha)
    root_EMM, failed_E = torch.linalg.cholesky_ex(inner_EMM)
    if failed_E.any():
        raise RuntimeError(
            f"alpha={alpha:g}: {projector_EII.dtype} cannot hold a projector with so small an alpha beside mean inputs "
            f"whose squared length is up to {float(seen_EIM.square().sum(1).max()):.3g} (where alpha decays, they are "
            "longer by as much); raise alpha, or set a rank, which holds any"
        )
    scaled_EMI = torch.linalg.solve_triangular(root_EMM, gain_EIM.mT, upper=False)
    return torch.baddbmm(projector_EII, scaled_EMI.mT, scaled_EMI, alpha=-1)


def forgotten(projector_EII: Tensor, *, share: float) -> Tensor:
    """The projectors drawn to the identity: b P + (1 - b) I, with b the share that is kept; P itself for 1.

    Source: our definition, section 4.1, forgetting.
    """
    if share == 1:
        return projector_EII
    scaled_EII = projector_EII * share
    scaled_EII.diagonal(dim1=1, dim2=2).add_(1 - share)
    return scaled_EII


def symmetrised(projector_EII: Tensor) -> Tensor:
    """(P + P^T) / 2.

    Source: our definition, section 4, pseudo-code.
    """
    return (projector_EII + projector_EII.mT) / 2


def others_share(num_tokens_E: Tensor, *, combine: Combine) -> Tensor:
    """How much of the others' projector of expert E is expert J's projector.

    Args:
        num_tokens_E: Tokens of every expert so far.
        combine: "mean" shares equally among the others, "load" by their tokens (equally while they have none); the
            other forms are no sums.

    Returns:
        (E, J) float64, rows summing to 1, zero on the diagonal.

    Source: our definition, section 4, item 2, and section 4.1.
    """
    num_experts = num_tokens_E.shape[0]
    weight_EJ = torch.ones(num_experts, num_experts, dtype=torch.float64, device=num_tokens_E.device)
    if combine == "load":
        weight_EJ = weight_EJ * num_tokens_E
    weight_EJ.fill_diagonal_(0)
    total_E = weight_EJ.sum(1, keepdim=True)
    equal_EJ = (1 - torch.eye(num_experts, dtype=torch.float64, device=num_tokens_E.device)) / (num_experts - 1)
    return torch.where(total_E > 0, weight_EJ / total_E.clamp(min=1), equal_EJ)


def removed_by_others(
    step_EOI: Tensor, projector_EII: Tensor, num_tokens_N: Tensor, *, combine: Combine, ranks: ExpertGroup = ALONE
) -> Tensor:
    """What the others' projector takes out of every expert's step: U (I - Q).

    Args:
        step_EOI: Finished steps of this rank's experts.
        projector_EII: Their projectors, made by `refreshed` from `seen_means` of the same `combine`.
        num_tokens_N: Tokens of every expert of all ranks so far.
        combine: How the others' projector is made.
        ranks: Who shares the experts; of their matrices only the sum travels.

    Returns:
        (E, O, I).

    Source: our definition, section 4, item 2: Q[i] = sum over j != i of P[j] / (N - 1), or its alternatives.
    """
    complement_EII = complements(projector_EII).to(step_EOI.dtype)
    if combine == "union":
        return step_EOI @ complement_EII
    weight_N = (
        num_tokens_N.to(step_EOI.dtype) if combine == "load" else torch.ones_like(num_tokens_N, dtype=step_EOI.dtype)
    )
    weight_E = weight_N[ranks.own(len(projector_EII))]
    total_II = ranks.total(torch.einsum("e,eij->ij", weight_E, complement_EII))
    removed_EOI = torch.empty_like(step_EOI)
    for expert, others in enumerate((weight_N.sum() - weight_E).clamp(min=1)):  # without tokens, nothing is taken out
        others_II = torch.sub(total_II, complement_EII[expert], alpha=float(weight_E[expert])).div_(others)
        torch.mm(step_EOI[expert], others_II, out=removed_EOI[expert])
    return removed_EOI


def removed_by_product(step_EOI: Tensor, taken_N: Sequence[tuple[Tensor, ...]], *, own: slice = slice(None)) -> Tensor:
    """What all other experts' projectors take out of every expert's step one after another: U - U P_1 P_2 ...

    Args:
        step_EOI: Finished steps of this rank's experts.
        taken_N: Of every expert of all ranks, in their order, matrices whose product is I - P.
        own: Where the steps' experts are among them.

    Returns:
        (E, O, I).

    Source: our definition, section 4.1, combining others: product.
    """
    kept_EOI = step_EOI
    expert_E = torch.arange(len(taken_N), device=step_EOI.device)[own]
    for other, taken in enumerate(taken_N):
        part_EOI = kept_EOI
        for matrix in taken:
            part_EOI = part_EOI @ matrix
        kept_EOI = torch.where((expert_E == other)[:, None, None], kept_EOI, kept_EOI - part_EOI)
    return step_EOI - kept_EOI


def complements(projector_EII: Tensor) -> Tensor:
    """I - P of every expert.

    Source: our definition, section 10: the own-projector control projects by P.
    """
    d_in = projector_EII.shape[1]
    return torch.eye(d_in, dtype=projector_EII.dtype, device=projector_EII.device) - projector_EII


def trace_share(trace_N: Tensor, num_tokens_N: Tensor, *, combine: Combine) -> Tensor:
    """trace(Q) / d of every expert: 1 leaves all directions, 0 none.

    Args:
        trace_N: trace(P) / d of every expert of all ranks, float64; for a union or a product, trace(Q) / d itself.
        num_tokens_N: Tokens of every expert so far.
        combine: How the others' projector is made.

    Returns:
        (N,) float64.

    Source: our definition, section 4.2.
    """
    return trace_N if combine in ("union", "product") else others_share(num_tokens_N, combine=combine) @ trace_N
