"""Routing: an assignment as rows in the order they travel, and where each token finds its rows again.

Legend: T tokens, K rows per token at most, E experts, A entries of the assignment, S rows sent, chunk by chunk, within
a chunk by expert (S = A).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_pipeline.gate import Assignment
from moe_pipeline.plan.partition import Partition


@dataclass(frozen=True, kw_only=True, eq=False)
class Routing:
    """Where every row comes from and goes back to.

    Source: MPipeMoE (arXiv:2506.22175) section II-A; rows without padding are our definition.
    """

    token_S: Tensor
    """int64, the token each row is a copy of."""
    weight_S: Tensor
    """The weight its result is combined with, differentiable."""
    row_TK: Tensor
    """int64, the rows of each token in their own order; S, which is no row, where a token has fewer than K."""


def expert_counts(assignment: Assignment, *, num_experts: int) -> tuple[int, ...]:
    """How many rows each expert computes.

    Args:
        assignment: The gate's entries, in any order.
        num_experts: E.

    Returns:
        One number per expert.

    Raises:
        ValueError: If an entry names an expert that does not exist.

    Source: MPipeMoE (arXiv:2506.22175) section II-A.
    """
    counts = tuple(torch.bincount(assignment.expert_A, minlength=num_experts).tolist())
    if len(counts) != num_experts:
        raise ValueError(
            f"assignment: names expert {len(counts) - 1}; accepted are 0 to {num_experts - 1}: give the gate and the "
            "experts the same num_experts"
        )
    return counts


def route(assignment: Assignment, partition: Partition, *, num_tokens: int) -> Routing:
    """Put an assignment into the order of a partition, keeping its order within each expert's slice.

    Args:
        assignment: The gate's entries, in any order.
        partition: Cut from the counts of this assignment.
        num_tokens: T.

    Returns:
        The routing.

    Source: MPipeMoE (arXiv:2506.22175) sections II-A and III-B; the sort is not in the paper.
    """
    order_S = assignment.expert_A.argsort(stable=True)
    if partition.num_chunks > 1:
        order_S = _by_chunk(order_S, partition)
    token_S = assignment.token_A[order_S]
    return Routing(token_S=token_S, weight_S=assignment.weight_A[order_S], row_TK=_rows_of_tokens(token_S, num_tokens))


def _by_chunk(order_S: Tensor, partition: Partition) -> Tensor:
    experts = [len(rank) for rank in partition.sent[0]]
    first = [[0] * count for count in experts]  # where each expert's rows begin
    position = 0
    for rank, count in enumerate(experts):
        for expert in range(count):
            first[rank][expert] = position
            position += sum(chunk[rank][expert].rows for chunk in partition.sent)
    return torch.cat(
        [
            order_S[first[rank][expert] + part.start : first[rank][expert] + part.stop]
            for chunk in partition.sent
            for rank, parts in enumerate(chunk)
            for expert, part in enumerate(parts)
        ]
    )


def _rows_of_tokens(token_S: Tensor, num_tokens: int) -> Tensor:
    """The inverse of `token_S`; for tokens with equally many rows a reshaped sort, else with places left over."""
    order_S = token_S.argsort(stable=True)
    counts_T = torch.bincount(token_S, minlength=num_tokens)
    most = int(counts_T.max()) if num_tokens else 0
    if most * num_tokens == len(token_S):
        return order_S.view(num_tokens, most)
    row_TK = token_S.new_full((num_tokens, most), len(token_S))
    sorted_S = token_S[order_S]
    first_T = counts_T.cumsum(0) - counts_T
    place_S = torch.arange(len(token_S), device=token_S.device) - first_T[sorted_S]
    row_TK[sorted_S, place_S] = order_S
    return row_TK
