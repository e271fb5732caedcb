"""A tiny Mixture-of-Experts model in both forms that `find_expert_linears` knows, and data for it.

Shapes: E experts, R rows (sorted by expert), T tokens, M model width, H hidden width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

NUM_EXPERTS, MODEL, HIDDEN = 4, 6, 10


class GroupedLinear(nn.Module):
    """Stands in for the pipelined layer's: one weight (E, d_out, d_in), rows sorted by expert."""

    def __init__(self, num_experts: int, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, d_out, d_in).repeat(num_experts, 1, 1) / d_in**0.5)

    def forward(self, rows_RI: Tensor, counts_E: Sequence[int] | Tensor) -> Tensor:
        counts = counts_E.tolist() if isinstance(counts_E, Tensor) else list(counts_E)
        return torch.cat([rows @ weight.T for rows, weight in zip(rows_RI.split(counts), self.weight, strict=True)])


class StackedExperts(nn.Module):
    def __init__(self, num_experts: int = NUM_EXPERTS) -> None:
        super().__init__()
        self.up = GroupedLinear(num_experts, MODEL, HIDDEN)
        self.down = GroupedLinear(num_experts, HIDDEN, MODEL)

    def forward(self, rows_RM: Tensor, counts_E: Sequence[int] | Tensor) -> Tensor:
        return self.down(self.up(rows_RM, counts_E).tanh(), counts_E)


class ListedExpert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(MODEL, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, MODEL, bias=False)

    def forward(self, rows_RM: Tensor) -> Tensor:
        return self.down(self.up(rows_RM).tanh())


class SmallMoE(nn.Module):
    """head(x + experts(x)); token t goes to expert expert_T[t]."""

    def __init__(self, *, listed: bool = False, num_experts: int = NUM_EXPERTS) -> None:
        super().__init__()
        stacked = StackedExperts(num_experts)
        self.experts: nn.Module = stacked
        self.head = nn.Linear(MODEL, 1)
        if listed:
            self.experts = nn.ModuleList(ListedExpert() for _ in range(num_experts))
            for index, expert in enumerate(self.experts):
                expert.up.weight.data.copy_(stacked.up.weight[index])
                expert.down.weight.data.copy_(stacked.down.weight[index])

    def forward(self, x_TM: Tensor, expert_T: Tensor) -> Tensor:
        order_T = expert_T.argsort(stable=True)
        rows_RM = x_TM[order_T]
        counts = expert_T.bincount(minlength=self.num_experts).tolist()
        if isinstance(self.experts, nn.ModuleList):
            pieces = zip(self.experts, rows_RM.split(counts), strict=True)
            outputs_RM = torch.cat([expert(rows) if len(rows) else rows for expert, rows in pieces])
        else:
            outputs_RM = self.experts(rows_RM, counts)
        return self.head(rows_RM + outputs_RM)

    @property
    def num_experts(self) -> int:
        return len(self.experts) if isinstance(self.experts, nn.ModuleList) else self.experts.up.weight.shape[0]


def batches(
    num_batches: int, *, tokens: int = 24, num_experts: int = NUM_EXPERTS
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(x_TM, expert_T, target) per batch; a common mean makes the experts' mean inputs overlap."""
    generator = torch.Generator().manual_seed(7)
    result = []
    for _ in range(num_batches):
        x_TM = torch.randn(tokens, MODEL, generator=generator) + 0.5
        expert_T = torch.randint(num_experts, (tokens,), generator=generator)
        result.append((x_TM, expert_T, torch.randn(tokens, 1, generator=generator)))
    return result


def loss_of(model: SmallMoE, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    x_TM, expert_T, target = batch
    return (model(x_TM, expert_T) - target[expert_T.argsort(stable=True)]).square().mean()
