import pytest
import torch
from closeness import assert_close, assert_equal_up_to_rounding
from torch import Tensor, nn

from omoe import ExpertLinear, OMoEConfig, find_expert_linears
from omoe.experts import stacked_EOI
from omoe.inputs import MeanInputs, mean_rows
from tests.omoe.small_moe import MODEL, GroupedLinear, SmallMoE, batches


def means_by_hand(forwards: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
    x_TM = torch.cat([x for x, _ in forwards]).to(dtype)
    expert_T = torch.cat([expert for _, expert in forwards])
    means = [x_TM[expert_T == expert].mean(0) if (expert_T == expert).any() else x_TM[0] * 0 for expert in range(4)]
    return torch.stack(means)


@pytest.mark.parametrize("listed", [False, True])
def test_several_forwards_sum_up_and_evaluation_does_not_count(listed: bool) -> None:
    model = SmallMoE(listed=listed)
    linears = find_expert_linears(model)
    inputs = MeanInputs(linears)
    forwards = [(x_TM, expert_T) for x_TM, expert_T, _ in batches(3)]
    assert not inputs.observed(linears[0])
    for x_TM, expert_T in forwards:
        model(x_TM, expert_T)
    model.eval()
    model(forwards[0][0] + 5, forwards[0][1])
    taken = inputs.take()
    assert inputs.observed(linears[0])
    assert list(taken) == ["experts.up", "experts.down"]
    expected = means_by_hand(forwards, torch.float32), means_by_hand(forwards, torch.float64)
    assert_close("mean input", taken["experts.up"].mean_EI, *expected)
    counts_E = torch.cat([expert_T for _, expert_T in forwards]).bincount()
    assert torch.equal(taken["experts.down"].num_tokens_E, counts_E)
    assert inputs.take()["experts.up"].num_tokens_E.sum() == 0


def test_an_expert_without_tokens_has_mean_zero() -> None:
    model = SmallMoE()
    inputs = MeanInputs(find_expert_linears(model))
    model(torch.ones(5, MODEL), torch.tensor([0, 0, 2, 2, 2]))
    taken = inputs.take()["experts.up"]
    assert taken.num_tokens_E.tolist() == [2, 0, 3, 0]
    assert torch.equal(taken.mean_EI, torch.tensor([[1.0], [0.0], [1.0], [0.0]]).expand(4, MODEL))


def test_counts_may_be_a_tensor_and_rows_low_precision() -> None:
    layer = GroupedLinear(2, 3, 3).bfloat16()
    inputs = MeanInputs([ExpertLinear(name="up", parameters=(layer.weight,), modules=(layer,))])
    rows_RI = torch.full((600, 3), 1.0, dtype=torch.bfloat16)  # bfloat16 holds no 501
    layer(rows_RI, torch.tensor([501, 99]))
    taken = inputs.take()["up"]
    assert taken.mean_EI.dtype == torch.float32
    assert torch.equal(taken.mean_EI, torch.ones(2, 3))


def test_remove_stops_observing() -> None:
    model = SmallMoE()
    linears = find_expert_linears(model)
    inputs = MeanInputs(linears)
    inputs.remove()
    model(*batches(1)[0][:2])
    assert not inputs.observed(linears[0])
    assert inputs.take()["experts.up"].num_tokens_E.sum() == 0


@pytest.mark.parametrize("counts", [[1, 1], [1, 1, 1], None, torch.tensor([4]), 4])
def test_bad_counts_are_named(counts: object) -> None:
    layer = GroupedLinear(2, 3, 3)
    MeanInputs([ExpertLinear(name="up", parameters=(layer.weight,), modules=(layer,))])
    with pytest.raises(ValueError, match="counts of 'up'"):
        layer(torch.ones(3, 3), counts)


def test_bad_rows_are_named() -> None:
    layer = nn.Linear(3, 3)
    other = nn.Linear(3, 3)
    MeanInputs([ExpertLinear(name="up", parameters=(layer.weight, other.weight), modules=(layer, other))])
    with pytest.raises(ValueError, match="inputs of 'up'"):
        layer(torch.ones(3, 4))
    layer(torch.ones(3))
    layer(torch.ones(2, 0, 3))


@pytest.mark.parametrize("listed", [False, True])
def test_outputs_may_be_observed_instead(listed: bool) -> None:
    model = SmallMoE(listed=listed)
    linears = find_expert_linears(model)
    inputs, outputs = MeanInputs(linears), MeanInputs(linears, side="output")
    x_TM, expert_T, _ = batches(1)[0]
    model(x_TM, expert_T)
    seen, given = inputs.take(), outputs.take()
    for linear in linears:
        mean_EI, mean_EO = seen[linear.name].mean_EI, given[linear.name].mean_EI
        weight_EOI = stacked_EOI(linear)
        assert torch.equal(seen[linear.name].num_tokens_E, given[linear.name].num_tokens_E)
        expected_EO = torch.stack([weight @ mean for weight, mean in zip(weight_EOI, mean_EI, strict=True)])
        assert_equal_up_to_rounding(linear.name, mean_EO, expected_EO, roundings=64)


def test_what_comes_out_must_be_rows() -> None:
    layer = nn.Linear(3, 4)
    other = nn.Linear(3, 4)
    linear = ExpertLinear(name="up", parameters=(layer.weight, other.weight), modules=(layer, other))
    MeanInputs([linear], side="output")
    layer.register_forward_hook(lambda module, inputs, output: output)
    layer(torch.ones(2, 3))
    layer.register_forward_hook(lambda module, inputs, output: [output], prepend=True)
    with pytest.raises(ValueError, match=r"inputs of 'up': got \['list'\].*\(\.\.\., 4\)"):
        layer(torch.ones(2, 3))


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("side", ["input", "output"])
def test_rows_of_weights_and_gradients_are_means_by_hand(listed: bool, side: str) -> None:
    torch.manual_seed(0)
    model = SmallMoE(listed=listed)
    (linear, _) = find_expert_linears(model)
    for parameter in linear.parameters:
        nn.init.normal_(parameter)
        parameter.grad = torch.randn_like(parameter)
    gradient_EOI = torch.stack([parameter.grad for parameter in linear.parameters]).view(linear.shape_EOI)  # type: ignore[misc]
    for source, matrix_EOI in (("weights", stacked_EOI(linear)), ("gradients", gradient_EOI)):
        config = OMoEConfig(space="input", source=source, side=side)  # type: ignore[arg-type]
        found = mean_rows(linear, config)
        means = [matrix_OI.sum(0) / 10 if side == "input" else matrix_OI.sum(1) / MODEL for matrix_OI in matrix_EOI]
        assert_equal_up_to_rounding(source, found.mean_EI, torch.stack(means), roundings=16)
        assert not found.num_tokens_E.any()
    linear.parameters[-1].grad = None
    missing_EI = mean_rows(linear, config).mean_EI
    assert not missing_EI[-1].any()
    assert bool(missing_EI[0].any()) is listed  # one gradient is all experts' where they are stacked


def test_rows_of_low_precision_are_summed_in_float32() -> None:
    layer = GroupedLinear(2, 3, 600).bfloat16()
    layer.weight.data.fill_(1.0)
    linear = ExpertLinear(name="up", parameters=(layer.weight,), modules=())
    found = mean_rows(linear, OMoEConfig(space="input", source="weights"))
    assert found.mean_EI.dtype == torch.float32
    assert torch.equal(found.mean_EI, torch.ones(2, 3))
