from itertools import pairwise

import pytest
import torch
from torch import nn

from omoe import ExpertLinear, OMoE, OMoEConfig, find_expert_linears
from omoe.cost import cost
from tests.omoe.small_moe import SmallMoE, batches, loss_of

CONFIGS = {
    "update": OMoEConfig(),
    "exact": OMoEConfig(space="input"),
    "gradients": OMoEConfig(space="input", source="gradients", side="output"),
    "low-rank": OMoEConfig(space="input", rank=3),
    "up": OMoEConfig(space="input", linears="up"),
}


def bert_base() -> list[ExpertLinear]:
    shapes = [(3072, 768), (768, 3072)]
    return [
        ExpertLinear(
            name=f"{layer}.{shape}", parameters=(nn.Parameter(torch.empty(8, *shape, device="meta")),), modules=()
        )
        for layer in range(12)
        for shape in shapes
    ]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_takes_what_was_said(config: OMoEConfig, copies: bool, dtype: torch.dtype) -> None:
    model = SmallMoE().to(dtype)
    if not copies:
        for linear in find_expert_linears(model):
            torch.nn.init.normal_(linear.parameters[0])
    optimizer = OMoE(torch.optim.SGD(model.parameters(), lr=0.1), find_expert_linears(model), config)
    x_TM, expert_T, target = batches(1)[0]
    loss_of(model, (x_TM.to(dtype), expert_T, target.to(dtype))).backward()
    optimizer.step()
    small = ("filled", "dropped_E")  # a few bytes an expert
    held = sum(
        tensor.nbytes
        for state in optimizer.linear_state.values()
        for name, tensor in state.items()
        if name not in small
    )
    assert cost(find_expert_linears(model), config, copies=copies).state_bytes == held


def test_bert_base_with_eight_experts_in_twelve_layers() -> None:
    assert cost(bert_base(), OMoEConfig()).state_bytes < 200e6
    assert cost(bert_base(), OMoEConfig(space="input")).state_bytes > 3.8e9
    assert cost(bert_base(), OMoEConfig(space="input", rank=64)).state_bytes < 200e6


def test_longer_cycles_cost_less() -> None:
    costs = [cost(bert_base(), OMoEConfig(space="input", period=period)) for period in (1, 2, 4)]
    for often, seldom in pairwise(costs):
        assert seldom.flops_per_step < often.flops_per_step
        assert seldom.moved_bytes_per_step < often.moved_bytes_per_step
        assert seldom.state_bytes == often.state_bytes
    assert costs[0].seconds_per_step(flops_per_s=1e12, bytes_per_s=1e11) > 0
    assert "MB" in str(costs[0])
