"""With fused kernels a network keeps its parameters and what it computes; chains compute it."""

from collections.abc import Iterator

import pytest
import torch
from closeness import assert_all_close
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import moe_pipeline
import omoe
from fusion.run.executors import DEFAULT, executors
from fusion.run.planned import planned_executor
from scripts.testbed.fused import FusedExperts, fuse
from tests.fusion.counted import Executor

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 1}
GATE = moe_pipeline.GateConfig(num_experts=4, top_k=2)


@pytest.fixture
def executor() -> Iterator[Executor]:
    made = Executor(lambda chain, needs: None)
    executors.add(DEFAULT, made)
    yield made
    executors.add(DEFAULT, planned_executor())


def upcycled(activation: str = "gelu", dropout: float = 0.0) -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_act=activation, hidden_dropout_prob=dropout, attention_probs_dropout_prob=0.0, **SIZES
    )
    network = BertModel(config, add_pooling_layer=False)
    moe_pipeline.upcycle(network, GATE, expert_noise_std=0.1)
    return network


def results(network: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    output = network(input_ids=inputs).last_hidden_state
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(output.square().mean(), parameters, allow_unused=True)
    gradients = torch.cat([gradient.flatten() for gradient in found if gradient is not None])
    return {"output": output.detach(), "gradients": gradients}


def test_attention_and_experts_are_chains_of_the_same_parameters(executor: Executor) -> None:
    network, plain = upcycled(), upcycled()
    (name,) = fuse(network)
    assert list(network.state_dict()) == list(plain.state_dict())
    assert isinstance(network.get_submodule(f"{name}.experts"), FusedExperts)
    inputs = torch.randint(0, 40, (2, 9))
    actual, expected = results(network, inputs), results(plain, inputs)
    assert_all_close(actual, expected, results(plain.double(), inputs))
    ran = {str(chain).partition("|")[0] for chain in executor.ran}
    assert any("softmax" in text for text in ran)
    assert any("gelu" in text for text in ran)


def test_the_orthogonal_optimizer_still_finds_the_experts(executor: Executor) -> None:
    network, plain = upcycled(), upcycled()
    fuse(network)
    assert str(omoe.find_expert_linears(network)) == str(omoe.find_expert_linears(plain))


def test_what_chains_do_not_compute_stays(executor: Executor) -> None:
    assert fuse(upcycled("tanh")) == []
    dropping = upcycled(dropout=0.5)
    (name,) = fuse(dropping)
    experts = dropping.get_submodule(f"{name}.experts")
    experts.dropout.p = 0.5
    rows = torch.randn(8, 16)
    executor.ran.clear()
    assert not torch.equal(experts(rows, (2, 2, 2, 2)), experts(rows, (2, 2, 2, 2)))
    assert not executor.ran
    experts.eval()(rows, (2, 2, 2, 2))
    assert executor.ran
