"""What steps leave in the others' subspace, against float64 and the definition's own toy."""

import pytest
import torch
from closeness import assert_equal_up_to_rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omoe import OMoEConfig, find_expert_linears
from omoe.input_space import refresh, removed
from omoe.inputs import MeanInput
from omoe.leftover import left_in_changes, left_in_inputs, others_complements
from omoe.spread import ExpertGroup
from omoe.state import LinearState, initial_state
from tests.omoe.small_moe import HIDDEN, MODEL, NUM_EXPERTS, SmallMoE

ALONE = ExpertGroup()


@given(st.integers(0, 1000), st.integers(2, 5), st.integers(30, 80))
@settings(max_examples=20, deadline=None)
def test_the_share_along_changes_is_that_of_an_orthonormal_basis(seed: int, num_experts: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    kept_EK, change_EK = torch.randn(2, num_experts, size, generator=generator, dtype=torch.float64)
    share_E = left_in_changes(kept_EK, change_EK)
    for expert, kept_K in enumerate(kept_EK):
        basis_KJ, _ = torch.linalg.qr(torch.cat([change_EK[:expert], change_EK[expert + 1 :]]).T)
        expected = (basis_KJ.T @ kept_K).norm() / kept_K.norm()
        assert_equal_up_to_rounding("share", share_E[expert], expected, roundings=10_000)


def test_nothing_changed_or_nothing_stepped_leaves_nothing() -> None:
    value_EK = torch.randn(3, 20)
    assert not left_in_changes(value_EK, torch.zeros(3, 20)).any()
    assert not left_in_changes(torch.zeros(3, 20), value_EK).any()
    state = after(OMoEConfig(space="input"), 0)
    assert left_in_inputs(drawn(), state, OMoEConfig(space="input"), ranks=ALONE).max() < 1e-5


def after(config: OMoEConfig, count: int = 5) -> LinearState:
    state = initial_state(find_expert_linears(SmallMoE())[0], config)
    for step, mean_EI in enumerate(means(config, count)):
        taken = MeanInput(mean_EI, torch.full((NUM_EXPERTS,), 3))
        refresh(state, taken, config, ranks=ALONE, num_steps=step + 1)
    return state


def means(config: OMoEConfig, count: int) -> list[Tensor]:
    width = MODEL if config.side == "input" else HIDDEN
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(NUM_EXPERTS, width, generator=generator) + 1 for _ in range(count)]


def drawn() -> Tensor:
    return torch.randn(NUM_EXPERTS, HIDDEN, MODEL, generator=torch.Generator().manual_seed(2))


FORMS = {
    "mean": OMoEConfig(space="input", alpha=2.0),
    "load": OMoEConfig(space="input", alpha=2.0, combine="load"),
    "product": OMoEConfig(space="input", alpha=2.0, combine="product"),
    "union": OMoEConfig(space="input", alpha=2.0, combine="union"),
    "output": OMoEConfig(space="input", alpha=2.0, side="output"),
    "decayed": OMoEConfig(space="input", alpha=2.0, alpha_decay=0.1, alpha_steps=5),
    "low-rank": OMoEConfig(space="input", alpha=2.0, rank=40),
    "low-rank union": OMoEConfig(space="input", alpha=2.0, rank=40, combine="union"),
}


@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS.keys())
def test_the_share_in_inputs_is_that_of_the_unions_closed_form(config: OMoEConfig) -> None:
    share_E = left_in_inputs(drawn(), after(config), config, ranks=ALONE)
    for expert in range(NUM_EXPERTS):
        inverse = torch.eye(MODEL if config.side == "input" else HIDDEN, dtype=torch.float64)
        for step, mean_EI in enumerate(means(config, 5)):
            others_JI = torch.cat([mean_EI[:expert], mean_EI[expert + 1 :]]).double()
            inverse += others_JI.T @ others_JI / config.alpha_at(step)
        step_OI = drawn()[expert].double() if config.side == "input" else drawn()[expert].double().T
        expected = (step_OI - step_OI @ inverse.inverse()).norm() / step_OI.norm()
        assert_equal_up_to_rounding("share", share_E[expert].float(), expected.float(), roundings=300)


def test_the_definitions_toy() -> None:
    """Eight experts with private spans of 5 of 64 dimensions: an averaged projector takes out next to nothing."""
    num_experts, size, span = 8, 64, 5
    generator = torch.Generator().manual_seed(0)
    state = {
        "projector_EII": torch.eye(size).repeat(num_experts, 1, 1),
        "num_tokens_E": torch.zeros(num_experts, dtype=torch.int64),
    }
    config = OMoEConfig(space="input", alpha=1e-3)
    basis_EIS = torch.randn(num_experts, size, span, generator=generator)
    for step in range(40):
        mean_EI = (basis_EIS @ torch.randn(num_experts, span, 1, generator=generator))[:, :, 0]
        taken = MeanInput(mean_EI, torch.ones(num_experts, dtype=torch.int64))
        refresh(state, taken, config, ranks=ALONE, num_steps=step + 1)
    step_EOI = torch.randn(num_experts, 30, size, generator=generator)
    kept_EOI = step_EOI - removed(step_EOI, state, config, ranks=ALONE)
    averaged = left_in_inputs(kept_EOI, state, config, ranks=ALONE).mean()
    by_chance = left_in_inputs(step_EOI, state, config, ranks=ALONE).mean()
    assert 0.7 < by_chance < 0.78
    assert by_chance - 0.1 < averaged < by_chance + 0.05
    union_EOI = step_EOI - (step_EOI.double() @ others_complements(state, config, ranks=ALONE)).float()
    assert left_in_inputs(union_EOI, state, config, ranks=ALONE).max() < 1e-3
