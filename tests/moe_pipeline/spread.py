"""A small model whose experts may be spread over ranks, and what training it should give, in one process."""

from collections.abc import Callable

import torch
from closeness import assert_all_close
from torch import Tensor, nn
from torch.nn import functional

from moe_pipeline import FeedForwardExperts, Gate, GateConfig, ModuleExperts, MoEFeedForward, MoELayer, routed
from moe_pipeline.config import PipelineConfig
from moe_pipeline.dispatch import local_part
from moe_pipeline.run.ranks import ExpertRanks

WIDTH, HIDDEN, NUM_EXPERTS, RATE, STEPS = 6, 10, 4, 0.3, 4
ROWS = (5, 9, 7, 3)  # of each rank's batch


class Net(nn.Module):
    """A dense layer, experts, a dense layer; its output is a loss."""

    def __init__(self, ranks: ExpertRanks | None = None, *, listed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(7)
        config = GateConfig(num_experts=NUM_EXPERTS, balance_weight=0.1)
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        gate = Gate(config, WIDTH)
        nn.init.normal_(gate.router.weight)
        experts: nn.Module = FeedForwardExperts(NUM_EXPERTS, WIDTH, HIDDEN, activation="gelu")
        if listed:
            experts = ModuleExperts([nn.Linear(WIDTH, WIDTH) for _ in range(NUM_EXPERTS)])
        if ranks is not None:
            local_part(experts, ranks)
        layer = MoELayer(gate, experts, pipeline=PipelineConfig(num_chunks=2), ranks=ranks, name="middle")
        self.middle = MoEFeedForward(layer)

    def forward(self, x_TM: Tensor, target_TO: Tensor) -> Tensor:
        x_TM = torch.tanh(self.first(x_TM))
        with routed(self) as records:
            x_TM = x_TM + self.middle(x_TM)
        return functional.mse_loss(self.last(x_TM), target_TO) + records["middle.moe"][0].loss


def batch(step: int, rank: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    rows = ROWS[rank]
    x_TM, target_TO = torch.randn(rows, WIDTH, generator=generator), torch.randn(rows, 3, generator=generator)
    return x_TM.to(dtype), target_TO.to(dtype)


def one_process(
    num_ranks: int, dtype: torch.dtype, *, accumulated: int = 1, max_norm: float | None = None, listed: bool = False
) -> dict[str, Tensor]:
    """Parameters after training on the mean of all ranks' losses."""
    model = Net(listed=listed).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(accumulated):
            for rank in range(num_ranks):
                loss = model(*batch(step * accumulated + part, rank, dtype))
                (loss / (num_ranks * accumulated)).backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_trained_alike(
    state: Callable[[], dict[str, Tensor]], num_ranks: int, *, accumulated: int = 1, max_norm: float | None = None,
    listed: bool = False,
) -> None:  # fmt: skip
    """Whole weights of a model that was trained on ranks equal those of one process, and moved."""
    settings = {"accumulated": accumulated, "max_norm": max_norm, "listed": listed}
    reference, truth = (one_process(num_ranks, dtype, **settings) for dtype in (torch.float32, torch.float64))  # type: ignore[arg-type]
    assert_all_close(state(), reference, truth)
    start = dict(Net(listed=listed).named_parameters())
    assert all((truth[name] - start[name]).abs().max() > 1e-3 for name in truth), "nothing was learned"
