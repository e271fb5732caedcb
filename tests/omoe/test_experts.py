import pytest
import torch
from torch import nn

from omoe import ExpertLinear, find_expert_linears
from omoe.experts import expert_weights, select_linears, stacked_EOI
from tests.omoe.small_moe import HIDDEN, MODEL, NUM_EXPERTS, GroupedLinear, ListedExpert, SmallMoE, StackedExperts


@pytest.mark.parametrize("listed", [False, True])
def test_both_forms_are_found_alike(listed: bool) -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([SmallMoE(listed=listed), nn.Conv1d(3, 3, 3)])})
    found = find_expert_linears(model)
    assert [linear.name for linear in found] == ["layers.0.experts.up", "layers.0.experts.down"]
    for linear, shape in zip(found, [(HIDDEN, MODEL), (MODEL, HIDDEN)], strict=True):
        assert linear.shape_EOI == (NUM_EXPERTS, *shape)
        assert linear.num_experts == NUM_EXPERTS
        assert linear.is_stacked is not listed
        assert len(linear.modules) == len(linear.parameters) == (NUM_EXPERTS if listed else 1)


def test_listed_and_stacked_copies_of_one_model_stack_equal() -> None:
    torch.manual_seed(1)
    stacked = find_expert_linears(SmallMoE())
    torch.manual_seed(1)
    listed = find_expert_linears(SmallMoE(listed=True))
    for one, other in zip(stacked, listed, strict=True):
        assert torch.equal(stacked_EOI(one), stacked_EOI(other))
        for left, right in zip(expert_weights(one), expert_weights(other), strict=True):
            assert torch.equal(left, right)


@pytest.mark.parametrize("listed", [False, True])
def test_weights_share_memory_with_the_model(listed: bool) -> None:
    linear = find_expert_linears(SmallMoE(listed=listed))[0]
    expert_weights(linear)[2].fill_(7.0)
    assert (stacked_EOI(linear)[2] == 7.0).all()
    assert not (stacked_EOI(linear)[1] == 7.0).any()


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(2, 2),
        nn.ModuleDict({"experts": nn.ModuleDict({"conv": nn.Conv1d(2, 2, 2)})}),
        nn.ModuleDict({"other": StackedExperts()}),
        nn.ModuleDict({"experts": nn.Sequential(ListedExpert(), ListedExpert())}),
    ],
)
def test_nothing_found_says_what_was_looked_for(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"no expert linear.*\.\.\.experts\.<linear>.*<number>"):
        find_expert_linears(model)


def test_an_expert_without_a_linear_is_named() -> None:
    model = SmallMoE(listed=True)
    del model.experts[1].up
    with pytest.raises(ValueError, match=r"3 of 4 experts have the linear 'experts.up'"):
        find_expert_linears(model)


def test_misshapen_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="parameters of expert linear 'x'"):
        ExpertLinear(name="x", parameters=(nn.Parameter(torch.zeros(2)),), modules=())
    with pytest.raises(ValueError, match="parameters of expert linear 'x'"):
        ExpertLinear(name="x", parameters=(), modules=())
    mixed = (nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(3, 2)))
    with pytest.raises(ValueError, match="one shape and dtype"):
        ExpertLinear(name="x", parameters=mixed, modules=())


def test_up_and_down_are_told_by_name() -> None:
    found = find_expert_linears(SmallMoE())
    assert [linear.name for linear in select_linears(found, "up")] == ["experts.up"]
    assert [linear.name for linear in select_linears(found, "down")] == ["experts.down"]
    assert select_linears(found, "both") == found
    gated = nn.ModuleDict({"experts": nn.ModuleDict({name: GroupedLinear(2, 3, 3) for name in ("w1", "w2", "w3")})})
    linears = find_expert_linears(gated)
    assert [linear.name for linear in select_linears(linears, "up")] == ["experts.w1", "experts.w3"]


def test_ambiguous_names_are_refused_only_when_it_matters() -> None:
    found = find_expert_linears(nn.ModuleDict({"experts": nn.ModuleDict({"mystery": GroupedLinear(2, 3, 3)})}))
    assert select_linears(found, "both") == found
    with pytest.raises(ValueError, match=r"linears='up'.*'experts.mystery'"):
        select_linears(found, "up")
    up_only = find_expert_linears(SmallMoE())[:1]
    with pytest.raises(ValueError, match="linears='down': none of"):
        select_linears(up_only, "down")
