"""Routing: an assignment as rows sorted by expert, and the pair of moves between tokens and rows.

Legend: T tokens, M model width, E experts, A entries of the assignment, R rows sorted by expert (R = A).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_pipeline.gate import Assignment


@dataclass(frozen=True, kw_only=True, eq=False)
class Routing:
    """Where every row comes from and goes back to.

    Source: MPipeMoE (arXiv:2506.22175) section II-A; rows without padding are our definition.
    """

    token_R: Tensor
    """int64, the token each row is a copy of."""
    weight_R: Tensor
    """The weight its result is combined with, differentiable."""
    counts: tuple[int, ...]
    """Rows per expert; expert e owns the counts[e] rows after those of experts 0 .. e-1."""


def route(assignment: Assignment, *, num_experts: int) -> Routing:
    """Sort an assignment by expert, keeping its order within each expert.

    Args:
        assignment: The gate's entries, in any order.
        num_experts: Number of experts; experts without tokens get no rows.

    Returns:
        The routing.

    Raises:
        ValueError: If an entry names an expert that does not exist.

    Source: MPipeMoE (arXiv:2506.22175) section II-A; the sort is not in the paper.
    """
    counts = tuple(torch.bincount(assignment.expert_A, minlength=num_experts).tolist())
    if len(counts) != num_experts:
        raise ValueError(
            f"assignment: names expert {len(counts) - 1}; accepted are 0 to {num_experts - 1}: give the gate and the "
            "experts the same num_experts"
        )
    order_R = assignment.expert_A.argsort(stable=True)
    return Routing(token_R=assignment.token_A[order_R], weight_R=assignment.weight_A[order_R], counts=counts)


def dispatch(x_TM: Tensor, routing: Routing) -> Tensor:
    """Copy each token to the rows of its experts.

    Args:
        x_TM: Tokens, any floating dtype.
        routing: Where the rows come from.

    Returns:
        rows_RM, sorted by expert, in the tokens' dtype.

    Source: MPipeMoE (arXiv:2506.22175) section II-A, the stage S.
    """
    return x_TM.index_select(0, routing.token_R)


def combine(rows_RM: Tensor, routing: Routing, *, num_tokens: int) -> Tensor:
    """Add every row, times its weight, to its token; tokens without rows become 0.

    Args:
        rows_RM: The experts' results, sorted by expert, any floating dtype.
        routing: The routing that `dispatch` used.
        num_tokens: T.

    Returns:
        y_TM in the rows' dtype; the sum is taken in the weights' dtype or a wider one.

    Source: MPipeMoE (arXiv:2506.22175) section II-A, the stage R.
    """
    weighted_RM = rows_RM * routing.weight_R.unsqueeze(-1)
    y_TM = weighted_RM.new_zeros(num_tokens, rows_RM.shape[-1])
    return y_TM.index_add(0, routing.token_R, weighted_RM).to(rows_RM.dtype)
