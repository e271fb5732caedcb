import math

import pytest
import torch
from closeness import assert_equal_up_to_rounding
from hypothesis import given, settings
from hypothesis import strategies as st

from omoe import change_cosine, expert_outputs, mean_pairwise, output_cosine, variation
from omoe.diversity import change_size
from tests.omoe.small_moe import MODEL, StackedExperts


def random_outputs(seed: int, num_experts: int = 3) -> torch.Tensor:
    return torch.randn(num_experts, 5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_every_expert_gets_the_whole_batch() -> None:
    experts = StackedExperts(3)
    experts.up.weight.data.normal_()
    h_TM = torch.randn(5, MODEL)
    output_ETM = expert_outputs(experts, h_TM, num_experts=3)
    for expert in range(3):
        counts = [5 if index == expert else 0 for index in range(3)]
        alone_TM = experts(h_TM, counts).detach()
        assert torch.equal(output_ETM[expert], alone_TM)
    together_RM = experts(h_TM.repeat(3, 1), [5] * 3).detach()
    assert_equal_up_to_rounding("at once", output_ETM.flatten(0, 1), together_RM, roundings=64)
    assert not output_ETM.requires_grad


def test_copies_measure_exactly_one_zero_and_undefined() -> None:
    experts = StackedExperts(3)
    outputs_ETM = expert_outputs(experts, torch.randn(7, MODEL), num_experts=3)
    assert torch.equal(output_cosine(outputs_ETM), torch.ones(3, 3, dtype=torch.float64))
    assert torch.equal(output_cosine(outputs_ETM, centred=True), torch.ones(3, 3, dtype=torch.float64))
    assert mean_pairwise(output_cosine(outputs_ETM)).item() == 1.0
    assert variation(outputs_ETM).item() == 0.0
    weight_EOI = experts.up.weight
    assert change_cosine(weight_EOI, weight_EOI.detach()).isnan().all()
    assert mean_pairwise(change_cosine(weight_EOI, weight_EOI.detach())).isnan()
    assert torch.equal(change_size(weight_EOI, weight_EOI.detach()), torch.zeros(3, dtype=torch.float64))


def test_measures_by_loop() -> None:
    output_ETM = random_outputs(0)
    cosine, variance, square = 0.0, 0.0, 0.0
    for token in range(5):
        mean = output_ETM[:, token].mean(0)
        for i in range(3):
            variance += (output_ETM[i, token] - mean).square().sum().item() / 15
            square += output_ETM[i, token].square().sum().item() / 15
            for j in range(i + 1, 3):
                a, b = output_ETM[i, token], output_ETM[j, token]
                cosine += (a @ b / a.norm() / b.norm()).item() / 5 / 3
    expected = torch.tensor([cosine, variance / square], dtype=torch.float64)
    actual = torch.stack([mean_pairwise(output_cosine(output_ETM)), variation(output_ETM)])
    assert_equal_up_to_rounding("measures", actual, expected, roundings=64)


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_cosines_ignore_length_and_keep_their_bounds(seed: int) -> None:
    output_ETM = random_outputs(seed)
    cosine_EE = output_cosine(output_ETM)
    assert torch.equal(cosine_EE, cosine_EE.T)
    assert_equal_up_to_rounding("diagonal", cosine_EE.diagonal(), torch.ones(3, dtype=torch.float64), roundings=4)
    assert cosine_EE.abs().max() <= 1 + 8 * torch.finfo(torch.float64).eps
    scaled = output_cosine(output_ETM * torch.tensor([0.1, 3.0, 1e6], dtype=torch.float64)[:, None, None])
    assert_equal_up_to_rounding("scaled", scaled, cosine_EE, roundings=32)


def test_a_common_mean_hides_differences_until_it_is_taken_off() -> None:
    output_ETM = random_outputs(1)
    shifted = output_ETM + 1000
    assert mean_pairwise(output_cosine(shifted)) > 0.99
    plain, centred = output_cosine(output_ETM, centred=True), output_cosine(shifted, centred=True)
    assert_equal_up_to_rounding("centred", centred, plain, roundings=32 * 1000)


def test_change_cosine_and_size() -> None:
    start_EOI = torch.ones(3, 2, 2)
    weight_EOI = start_EOI.clone()
    weight_EOI[0, 0, 0] += 1
    weight_EOI[1, 0, 0] -= 2
    weight_EOI[2, 1, 1] += 1
    expected = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    assert torch.equal(change_cosine(weight_EOI, start_EOI), expected)
    assert change_size(weight_EOI, start_EOI).tolist() == [0.5, 1.0, 0.5]


def test_float32_inputs_are_measured_in_float64() -> None:
    weight_EOI = torch.randn(2, 300, 1000)
    cosine = change_cosine(weight_EOI, torch.zeros_like(weight_EOI))
    exact = change_cosine(weight_EOI.double(), torch.zeros_like(weight_EOI).double())
    assert torch.equal(cosine, exact)


def test_undefined_measures_are_nan() -> None:
    assert variation(torch.zeros(2, 3, 4)).isnan()
    assert output_cosine(torch.zeros(2, 3, 4)).isnan().all()
    assert math.isnan(change_cosine(torch.ones(2, 1, 1), torch.tensor([[[1.0]], [[0.0]]]))[0, 1].item())


def test_errors() -> None:
    with pytest.raises(ValueError, match="h_TM is empty"):
        expert_outputs(StackedExperts(2), torch.zeros(0, MODEL), num_experts=2)
    with pytest.raises(ValueError, match="experts returned shape"):
        expert_outputs(lambda rows, counts: rows[:1], torch.zeros(3, MODEL), num_experts=2)
    with pytest.raises(ValueError, match="cosine_EE is of 1 expert"):
        mean_pairwise(torch.ones(1, 1))
