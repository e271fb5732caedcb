"""torch's Muon, which takes matrices alone, as the base of experts that are one matrix each."""

import io

import pytest
import torch
from closeness import assert_equal_up_to_rounding
from torch import Tensor

from omoe import OMoE, OMoEConfig, find_expert_linears
from omoe.experts import expert_weights
from omoe.inputs import MeanInputs
from tests.omoe.small_moe import NUM_EXPERTS, SmallMoE, batches, loss_of

LR, DECAY = 0.02, 0.1
CONFIGS = {"update": OMoEConfig(), "input": OMoEConfig(space="input", alpha=1.0)}
SHARP = OMoEConfig(space="input", alpha=1e-8, combine="union")
"""Nearly the projector on the complement of a span; for one refresh, for float32 holds no more at such an alpha."""


def matrices(model: SmallMoE) -> list[torch.nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if "experts" in name]


def small(dtype: torch.dtype = torch.float32) -> SmallMoE:
    torch.manual_seed(5)
    return SmallMoE(listed=True).to(dtype)


def muon(model: SmallMoE) -> torch.optim.Optimizer:
    return torch.optim.Muon(matrices(model), lr=LR, weight_decay=DECAY)


def wrapped(model: SmallMoE, config: OMoEConfig) -> OMoE:
    return OMoE(muon(model), find_expert_linears(model), config)


def train(model: SmallMoE, optimizer: torch.optim.Optimizer, data: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    dtype = matrices(model)[0].dtype
    for x_TM, expert_T, target in data:
        optimizer.zero_grad()
        loss_of(model, (x_TM.to(dtype), expert_T, target.to(dtype))).backward()
        optimizer.step()


def weights(model: SmallMoE) -> dict[str, Tensor]:
    return {linear.name: torch.stack(expert_weights(linear)) for linear in find_expert_linears(model)}


def test_steps_have_no_component_along_the_others_changes() -> None:
    model = small(torch.float64)
    optimizer = wrapped(model, CONFIGS["update"])
    start = weights(model)
    train(model, optimizer, batches(4))
    before = weights(model)
    train(model, optimizer, batches(5)[4:])
    for name, after in weights(model).items():
        step_EK = (after - before[name] * (1 - LR * DECAY)).flatten(1)
        change_EK = (before[name] - start[name]).flatten(1)
        cosine_EJ = step_EK @ change_EK.T / step_EK.norm(dim=1)[:, None] / change_EK.norm(dim=1)
        others = ~torch.eye(NUM_EXPERTS, dtype=torch.bool)
        assert cosine_EJ[others].abs().max() < 1e-5
        assert cosine_EJ.diagonal().abs().min() > 1e-2


def test_steps_have_no_component_along_the_others_mean_inputs() -> None:
    model = small(torch.float64)
    optimizer = wrapped(model, SHARP)
    observer = MeanInputs(find_expert_linears(model))
    train(model, optimizer, batches(1))
    means, before = observer.take(), weights(model)
    train(model, optimizer, batches(2)[1:])
    for name, after in weights(model).items():
        step_EOI = after - before[name] * (1 - LR * DECAY)
        mean_EI = means[name].mean_EI.double()
        for expert, step_OI in enumerate(step_EOI):
            others_JI = torch.cat([mean_EI[:expert], mean_EI[expert + 1 :]])
            cosine_OJ = step_OI @ others_JI.T / step_OI.norm() / others_JI.norm(dim=1)
            assert cosine_OJ.abs().max() < 1e-5
        assert (optimizer.removed_energy()[name] > 0.01).all()


@pytest.mark.parametrize("space", CONFIGS)
def test_without_orthogonal_steps_it_is_muon_bit_for_bit(space: str) -> None:
    plain, model = small(), small()
    train(plain, muon(plain), batches(5))
    config = OMoEConfig(space=space, first_orthogonal_step=10**9)  # type: ignore[arg-type]
    train(model, wrapped(model, config), batches(5))
    for name, weight_EOI in weights(model).items():
        assert torch.equal(weight_EOI, weights(plain)[name]), name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_resumes_bit_for_bit(config: OMoEConfig) -> None:
    model = small()
    optimizer = wrapped(model, config)
    train(model, optimizer, batches(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, batches(6)[3:])
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = SmallMoE(listed=True)
    resumed.load_state_dict(saved["model"])
    again = wrapped(resumed, config)
    again.load_state_dict(saved["optimizer"])
    train(resumed, again, batches(6)[3:])
    for name, weight_EOI in weights(resumed).items():
        assert torch.equal(weight_EOI, weights(model)[name]), name


def test_decay_is_apart_from_the_projected_step() -> None:
    model = small()
    optimizer = wrapped(model, OMoEConfig())
    train(model, optimizer, batches(2))
    for state in optimizer.state.values():
        state["momentum_buffer"].zero_()
    before = weights(model)
    for parameter in matrices(model):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, weight_EOI in weights(model).items():
        assert_equal_up_to_rounding(name, weight_EOI, before[name] * (1 - LR * DECAY), roundings=2)
