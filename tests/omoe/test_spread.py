"""Experts spread over two processes do what they do in one."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from closeness import assert_close
from ranks import run_ranks
from torch import Tensor, nn

from omoe import OMoE, OMoEConfig, find_expert_linears
from omoe.spread import ExpertGroup
from tests.omoe.small_moe import HIDDEN, MODEL, NUM_EXPERTS, StackedExperts

STEPS = 20
CONFIGS = {
    "update": OMoEConfig(),
    "mean": OMoEConfig(space="input", alpha=1.0),
    "load": OMoEConfig(space="input", alpha=1.0, combine="load", period=2),
    "union": OMoEConfig(space="input", alpha=1.0, combine="union"),
    "product": OMoEConfig(space="input", alpha=1.0, combine="product"),
    "output": OMoEConfig(space="input", alpha=1.0, side="output", alpha_decay=0.1, alpha_steps=STEPS),
    "weights": OMoEConfig(space="input", alpha=0.01, source="weights", combine="union"),
    "gradients": OMoEConfig(space="input", alpha=0.01, source="gradients", side="output", rank=24),
    "product-low-rank": OMoEConfig(space="input", alpha=1.0, combine="product", rank=16),
    "low-rank": OMoEConfig(space="input", alpha=1.0, rank=16),
    "length": OMoEConfig(control="length"),
    "random": OMoEConfig(space="input", alpha=1.0, control="random"),
}


def trained(config: OMoEConfig, own: slice, group: dist.ProcessGroup | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of some of the experts after steps whose gradients and inputs are drawn for all."""
    torch.manual_seed(3)
    model = nn.ModuleDict({"experts": StackedExperts(NUM_EXPERTS)}).to(dtype)
    linears = [model["experts"].up, model["experts"].down]
    for linear in linears:
        linear.weight = nn.Parameter(linear.weight.detach()[own].clone())
    optimizer = OMoE(
        torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9),
        find_expert_linears(model),
        config,
        expert_group=group,
        process_group=dist.new_group([dist.get_rank()], use_local_synchronization=True) if group else None,
        measure_every=STEPS,
    )
    generator = torch.Generator().manual_seed(11)
    for _ in range(STEPS):
        for linear, (d_out, d_in) in zip(linears, ((HIDDEN, MODEL), (MODEL, HIDDEN)), strict=True):
            rows = torch.randn(3 * NUM_EXPERTS, d_in, generator=generator) + 0.5
            gradient = torch.randn(NUM_EXPERTS, d_out, d_in, generator=generator) + 0.3
            own_rows = rows.view(NUM_EXPERTS, 3, d_in)[own]
            linear(own_rows.flatten(0, 1).to(dtype), [3] * len(own_rows))
            linear.weight.grad = gradient[own].to(dtype)
        optimizer.step()
    found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    if config != OMoEConfig():  # which leaves nothing but rounding
        found |= {f"leftover {name}": share_E for name, share_E in optimizer.leftover().items()}
    return found


def on_rank(rank: int, world_size: int, folder: str) -> None:
    group = dist.new_group(list(range(world_size)))
    assert group is not None
    own = ExpertGroup(group).own(NUM_EXPERTS // world_size)
    torch.save(
        {name: trained(config, own, group, torch.float32) for name, config in CONFIGS.items()}, f"{folder}/{rank}"
    )


def test_two_processes_give_what_one_gives_after_twenty_steps(tmp_path: Path) -> None:
    run_ranks(2, on_rank, str(tmp_path))
    ranks = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2)]
    for name, config in CONFIGS.items():
        alone, truth = (trained(config, slice(None), None, dtype) for dtype in (torch.float32, torch.float64))
        for parameter in alone:
            both = torch.cat([found[name][parameter] for found in ranks])
            assert_close(f"{name} {parameter}", both, alone[parameter], truth[parameter])


def test_every_expert_has_a_place() -> None:
    alone = ExpertGroup()
    assert (alone.size, alone.rank, alone.own(4)) == (1, 0, slice(0, 4))
    value = torch.randn(2, 3)
    assert torch.equal(alone.gather(value), value)
    assert torch.equal(alone.total(value), value)


def test_one_expert_here_and_none_elsewhere_is_refused() -> None:
    model = nn.ModuleDict({"experts": StackedExperts(1)})
    with pytest.raises(ValueError, match="no other to keep out of"):
        OMoE(torch.optim.SGD(model.parameters(), lr=0.1), find_expert_linears(model), OMoEConfig())
