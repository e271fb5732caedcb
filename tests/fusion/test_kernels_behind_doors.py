"""The doors with C++ kernels behind them, whatever those take: models keep what they compute and learn."""

import threading

import pytest
import torch
from closeness import assert_all_close, assert_equal_up_to_rounding
from torch import nn

from fusion import hugging_face
from fusion.compile import Backend
from fusion.experts import feed_forward
from fusion.plan.device import load_device
from fusion.run.cpp import executor as cpu
from fusion.run.executors import DEFAULT, executors
from fusion.run.planned import planned_executor
from moe_pipeline import FeedForwardExperts
from tests.fusion.models import llama, padded

COUNTS = (20, 0, 30, 17)  # of one interval of sizes, so that they share their kernels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("winners")


@pytest.fixture
def asked(monkeypatch, folder):
    """Kernels win against torch, and their searches are short; the outcomes of what was asked for."""
    monkeypatch.setattr(
        cpu, "measure_us", lambda runs, _: [float(index) for index, run in enumerate(runs) if run() is not runs]
    )
    monkeypatch.setattr(cpu, "COMPILED", 1)
    monkeypatch.setattr(cpu, "this_cpu", lambda: load_device("cpu"))
    kernels, outcomes = cpu.cpp_executor(cache_folder=folder), []

    def executor_for(chain, needs, device):
        if needs and chain.products[0].out == "C" and "bias_C" in chain.tensors:
            return "the hidden values of experts are better kept than computed again"
        outcomes.append(kernels(chain, needs, device))
        return outcomes[-1]

    executors.add(DEFAULT, executor_for)
    yield outcomes
    executors.add(DEFAULT, planned_executor())


def gradients(output, parameters):
    return torch.cat([x.flatten() for x in torch.autograd.grad(output.square().mean(), parameters)])


def test_attention_of_a_model_learns_by_kernels(asked):
    torch.manual_seed(0)
    model, plain = llama(attn_implementation=hugging_face.NAME), llama(attn_implementation="eager")
    plain.load_state_dict(model.state_dict())
    given = padded(2, 20)
    found = [(output := m(**given).logits, gradients(output, list(m.parameters()))) for m in (model, plain)]
    double = plain.double()
    truth = (output := double(**given).logits, gradients(output, list(double.parameters())))
    actual, expected, exact = ({"output": output.detach(), "gradients": of} for output, of in (*found, truth))
    assert_all_close(actual, expected, exact)
    assert asked
    assert not [outcome for outcome in asked if isinstance(outcome, str)]


def test_experts_learn_by_kernels(asked):
    torch.manual_seed(0)
    experts = FeedForwardExperts(4, 24, 40, activation="silu", gated=False)
    rows = torch.randn(sum(COUNTS), 24)

    def fused(x):
        up, down = experts.up, experts.down
        return feed_forward(x, COUNTS, up.weight, up.bias, down.weight, down.bias, activation="silu")

    def results(call, x):
        output = call(x)
        return {"output": output.detach(), "gradients": gradients(output, [x, *experts.parameters()])}

    actual = results(fused, rows.clone().requires_grad_())
    expected = results(lambda x: experts(x, COUNTS), rows.clone().requires_grad_())
    experts.double()
    assert_all_close(actual, expected, results(lambda x: experts(x, COUNTS), rows.double().requires_grad_()))
    assert asked
    assert not [outcome for outcome in asked if isinstance(outcome, str)]


def test_a_compiled_model_runs_kernels_in_threads_and_at_other_sizes(asked):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24), nn.LayerNorm(24))
    call = torch.compile(model, backend=Backend(), options={"rest": "eager"})
    with torch.no_grad():
        for rows in (20, 30, 17):
            x = torch.randn(rows, 24)
            assert_equal_up_to_rounding("output", call(x), model(x), roundings=512)
        found = []
        threads = [threading.Thread(target=lambda: found.append(call(x))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 4
    assert all(torch.equal(one, found[0]) for one in found)
    assert asked
    assert not [outcome for outcome in asked if isinstance(outcome, str)]
