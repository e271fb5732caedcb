"""The experts of Hugging Face's classes, as the library builds them."""

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from omoe import OMoE, OMoEConfig, find_expert_linears

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
MODELS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(num_local_experts=4, **SIZES)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=8, **SIZES)
    ),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(num_experts=4, **SIZES)),
}


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().train()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("name", MODELS)
def test_steps_keep_out_of_the_others_changes(name: str) -> None:
    model = built(name)
    linears = find_expert_linears(model)
    assert [linear.name.rpartition(".")[2] for linear in linears] == ["gate_up_proj", "down_proj"] * 2
    assert all(linear.num_experts == 4 for linear in linears)
    optimizer = OMoE(torch.optim.SGD(model.parameters(), lr=0.5), linears, OMoEConfig())
    start = {linear.name: linear.parameters[0].detach().clone() for linear in linears}
    for seed in range(3):
        before = {linear.name: linear.parameters[0].detach().clone() for linear in linears}
        step(model, optimizer, seed)
    for linear in linears:
        change_EK = (before[linear.name] - start[linear.name]).flatten(1).double()
        step_EK = (linear.parameters[0].detach() - before[linear.name]).flatten(1).double()
        lengths_EE = step_EK.norm(dim=1)[:, None] * change_EK.norm(dim=1)
        cosine_EE = (step_EK @ change_EK.T / lengths_EE).fill_diagonal_(0)
        assert cosine_EE.abs().max() < 1e-4  # float32 weights: a step is known to a few thousandths of its rounding


@pytest.mark.parametrize("name", MODELS)
def test_mean_inputs_are_those_of_the_chosen_tokens(name: str) -> None:
    model = built(name)
    linears = find_expert_linears(model)
    optimizer = OMoE(
        torch.optim.SGD(model.parameters(), lr=0.5), linears, OMoEConfig(space="input", linears="up", alpha=1.0)
    )
    seen: dict[str, tuple[Tensor, ...]] = {}
    for linear in optimizer.expert_linears:
        linear.modules[0].register_forward_pre_hook(
            lambda module, inputs, name=linear.name: seen.update({name: tuple(value.detach() for value in inputs)})
        )
    step(model, optimizer, 0)
    for linear in optimizer.expert_linears:
        hidden_TM, choice_TK = seen[linear.name][:2]
        counts = [int((choice_TK == expert).sum()) for expert in range(4)]
        assert optimizer.linear_state[linear.name]["num_tokens_E"].tolist() == counts
        shares = optimizer.trace_share()[linear.name]
        assert (shares < 1).all()
        assert hidden_TM.shape[1] == linear.shape_EOI[2]


def test_inputs_made_inside_are_refused() -> None:
    model = built("mixtral")
    with pytest.raises(
        ValueError, match=r"inside MixtralExperts; set linears='up', source='weights' or 'gradients', or space"
    ):
        OMoE(torch.optim.SGD(model.parameters(), lr=0.1), find_expert_linears(model), OMoEConfig(space="input"))


def test_outputs_inside_a_class_are_refused() -> None:
    model = built("mixtral")
    config = OMoEConfig(space="input", linears="up", side="output")
    with pytest.raises(ValueError, match=r"side='output'.*gate_up_proj.*stay inside"):
        OMoE(torch.optim.SGD(model.parameters(), lr=0.5), find_expert_linears(model), config)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("source", ["weights", "gradients"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_weights_and_gradients_of_every_linear_may_be_the_source(name: str, source: str, side: str) -> None:
    model = built(name)
    linears = find_expert_linears(model)
    config = OMoEConfig(space="input", source=source, side=side, alpha=1e-6)  # type: ignore[arg-type]
    optimizer = OMoE(torch.optim.SGD(model.parameters(), lr=0.5), linears, config)
    for seed in range(3):
        step(model, optimizer, seed)
    for linear in linears:
        assert not linear.modules[0]._forward_pre_hooks
        assert (optimizer.trace_share()[linear.name] < 1).all()
        assert (optimizer.removed_energy()[linear.name] > 0).all()
