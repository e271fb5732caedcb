import pytest
import torch
from closeness import assert_equal_up_to_rounding
from torch import Tensor

from omoe import OMoEConfig, find_expert_linears
from omoe.input_space import others_trace, rank_error, refresh, removed
from omoe.inputs import MeanInput
from omoe.projector import complements
from omoe.spread import ExpertGroup
from omoe.state import LinearState, initial_state
from tests.omoe.small_moe import HIDDEN, MODEL, NUM_EXPERTS, SmallMoE

ALONE = ExpertGroup()


def after(config: OMoEConfig, count: int = 5) -> LinearState:
    state = initial_state(find_expert_linears(SmallMoE())[0], config)
    generator = torch.Generator().manual_seed(1)
    for step in range(count):
        mean_EI = torch.randn(NUM_EXPERTS, MODEL, generator=generator) + 1
        tokens_E = torch.randint(1, 9, (NUM_EXPERTS,), generator=generator)
        refresh(state, MeanInput(mean_EI, tokens_E), config, ranks=ALONE, num_steps=step + 1)
    return state


def drawn() -> Tensor:
    return torch.randn(NUM_EXPERTS, HIDDEN, MODEL, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("combine", ["mean", "load", "product", "union"])
def test_a_rank_above_the_inputs_is_exact(combine: str) -> None:
    exact, low = (OMoEConfig(space="input", alpha=1.0, combine=combine, rank=rank) for rank in (None, 20))  # type: ignore[arg-type]
    states = [after(config) for config in (exact, low)]
    removed_EOI, low_EOI = (
        removed(drawn(), state, config, ranks=ALONE) for state, config in zip(states, (exact, low), strict=True)
    )
    assert_equal_up_to_rounding("removed", low_EOI, removed_EOI, roundings=300)
    traces = [others_trace(state, config, ranks=ALONE) for state, config in zip(states, (exact, low), strict=True)]
    assert_equal_up_to_rounding("trace", traces[1].float(), traces[0].float(), roundings=300)
    assert not rank_error(states[1], low).any()


def test_the_union_leaves_nothing_in_the_others_span_and_the_mean_what_its_formula_says() -> None:
    """As alpha goes to 0 the union's projector is that of the span of all other experts' mean inputs."""
    count = 1
    tiny = OMoEConfig(space="input", alpha=1e-9, combine="union")
    state = initial_state(find_expert_linears(SmallMoE().double())[0], tiny)
    state["projector_EII"] = state["projector_EII"].double()
    mean_EI = torch.randn(NUM_EXPERTS, MODEL, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    refresh(state, MeanInput(mean_EI, torch.ones(NUM_EXPERTS, dtype=torch.int64)), tiny, ranks=ALONE, num_steps=count)
    kept_EOI = drawn().double()
    kept_EOI -= removed(kept_EOI, state, tiny, ranks=ALONE)
    for expert in range(NUM_EXPERTS):
        others_JI = torch.cat([mean_EI[:expert], mean_EI[expert + 1 :]])
        assert (kept_EOI[expert] @ others_JI.T).abs().max() < 1e-5

    mean = OMoEConfig(space="input", alpha=1.0)
    own = after(mean)
    kept_EOI = drawn() - removed(drawn(), own, mean, ranks=ALONE)
    left_EOI = torch.stack(
        [
            sum((drawn()[e] @ own["projector_EII"][j] for j in range(NUM_EXPERTS) if j != e), torch.zeros(()))
            / (NUM_EXPERTS - 1)
            for e in range(NUM_EXPERTS)
        ]
    )
    assert_equal_up_to_rounding("leftover", kept_EOI, left_EOI, roundings=64)


def test_controls_take_out_ones_own_or_random_directions() -> None:
    own = OMoEConfig(space="input", alpha=1.0, control="own")
    state = after(own)
    expected_EOI = drawn() @ complements(state["projector_EII"])
    assert torch.equal(removed(drawn(), state, own, ranks=ALONE), expected_EOI)
    low = OMoEConfig(space="input", alpha=1.0, control="own", rank=20)
    assert_equal_up_to_rounding("own", removed(drawn(), after(low), low, ranks=ALONE), expected_EOI, roundings=300)
    turned = OMoEConfig(space="input", alpha=1.0, control="random")
    first = removed(drawn(), state, turned, ranks=ALONE, seed=1)
    assert torch.equal(first, removed(drawn(), state, turned, ranks=ALONE, seed=1))
    assert not torch.equal(first, removed(drawn(), state, turned, ranks=ALONE, seed=2))
    plain = OMoEConfig(space="input", alpha=1.0)
    eye_EII = torch.eye(MODEL).repeat(NUM_EXPERTS, 1, 1)
    for config, seed in ((plain, 0), (turned, 7)):
        trace_E = removed(eye_EII, state, config, ranks=ALONE, seed=seed).diagonal(dim1=1, dim2=2).sum(1)
        expected_E = MODEL * (1 - others_trace(state, plain, ranks=ALONE))
        assert_equal_up_to_rounding("trace", trace_E, expected_E.float(), roundings=64)


@pytest.mark.parametrize("rank", [None, 4])
def test_an_input_that_is_not_finite_counts_as_none(rank: int | None) -> None:
    config = OMoEConfig(space="input", alpha=1.0, rank=rank)
    broken, missing = after(config), after(config)
    mean_EI, tokens_E = torch.randn(NUM_EXPERTS, MODEL), torch.full((NUM_EXPERTS,), 3)
    mean_EI[1, 2] = torch.nan
    refresh(broken, MeanInput(mean_EI.clone(), tokens_E.clone()), config, ranks=ALONE, num_steps=6)
    mean_EI[1], tokens_E[1] = 0, 0
    refresh(missing, MeanInput(mean_EI, tokens_E), config, ranks=ALONE, num_steps=6)
    for name, tensor in broken.items():
        assert torch.equal(tensor, missing[name]), name


@pytest.mark.parametrize("rank", [None, 20])
def test_the_trace_of_a_product_is_that_of_its_matrix(rank: int | None) -> None:
    config = OMoEConfig(space="input", alpha=1.0, combine="product", rank=rank)
    exact = after(OMoEConfig(space="input", alpha=1.0, combine="product"))["projector_EII"].double()
    expected = []
    for expert in range(NUM_EXPERTS):
        product = torch.eye(MODEL, dtype=torch.float64)
        for other in range(NUM_EXPERTS):
            product = product if other == expert else product @ exact[other]
        expected.append(product.trace() / MODEL)
    found_E = others_trace(after(config), config, ranks=ALONE)
    assert_equal_up_to_rounding("trace", found_E.float(), torch.stack(expected).float(), roundings=300)


def test_a_decaying_alpha_weighs_an_input_by_its_own() -> None:
    config = OMoEConfig(space="input", alpha=4.0, alpha_decay=0.01, alpha_steps=4)
    generator = torch.Generator().manual_seed(1)
    inverse_EII = torch.eye(MODEL, dtype=torch.float64).repeat(NUM_EXPERTS, 1, 1)
    for step in range(5):
        mean_EI = (torch.randn(NUM_EXPERTS, MODEL, generator=generator) + 1).double()
        torch.randint(1, 9, (NUM_EXPERTS,), generator=generator)
        inverse_EII += mean_EI[:, :, None] * mean_EI[:, None] / config.alpha_at(step)
    found_EII = after(config)["projector_EII"]
    assert_equal_up_to_rounding("projector", found_EII, inverse_EII.inverse().float(), roundings=300)
