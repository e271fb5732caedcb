import pytest
import torch
from closeness import assert_close, assert_equal_up_to_rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_pipeline.gate import Assignment
from moe_pipeline.losses import RouterLosses
from moe_pipeline.routing import combine, dispatch, route

NO_LOSSES = RouterLosses(balance=torch.zeros(()), z=torch.zeros(()), importance=torch.zeros(()))


def _assignment(token_A: Tensor, expert_A: Tensor, weight_A: Tensor) -> Assignment:
    count = len(token_A)
    return Assignment(token_A=token_A, expert_A=expert_A, weight_A=weight_A, num_chosen=count, losses=NO_LOSSES)


def _random(num_tokens: int, num_experts: int, num_entries: int) -> Assignment:
    entries = num_entries if num_tokens else 0
    return _assignment(
        torch.randint(0, max(num_tokens, 1), (entries,)),
        torch.randint(0, num_experts, (entries,)),
        torch.rand(entries, requires_grad=True),
    )


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 20), st.integers(1, 6), st.integers(0, 50))
def test_rows_are_sorted_stably_and_complete(num_tokens: int, num_experts: int, num_entries: int) -> None:
    assignment = _random(num_tokens, num_experts, num_entries)
    routing = route(assignment, num_experts=num_experts)
    triples = zip(assignment.expert_A.tolist(), assignment.token_A.tolist(), assignment.weight_A.tolist(), strict=True)
    expected = sorted(triples, key=lambda triple: triple[0])
    owners = [expert for expert, count in enumerate(routing.counts) for _ in range(count)]
    assert len(routing.counts) == num_experts
    assert list(zip(owners, routing.token_R.tolist(), routing.weight_R.tolist(), strict=True)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_combine_and_gradients_equal_a_loop(dtype: torch.dtype) -> None:
    assignment = _random(9, 4, 30)
    routing = route(assignment, num_experts=4)
    x_TM, grad_TM = torch.randn(9, 5).to(dtype), torch.randn(9, 5).to(dtype)

    def run(to: torch.dtype, *, fast: bool) -> dict[str, Tensor]:
        leaf_TM = x_TM.to(to, copy=True).requires_grad_()
        weight_A = assignment.weight_A.detach().to(torch.promote_types(to, torch.float32), copy=True).requires_grad_()
        if fast:
            mine = route(_assignment(assignment.token_A, assignment.expert_A, weight_A), num_experts=4)
            y_TM = combine(dispatch(leaf_TM, mine), mine, num_tokens=9)
        else:
            sums = [torch.zeros(5, dtype=weight_A.dtype) for _ in range(9)]
            for token, weight in zip(assignment.token_A.tolist(), weight_A, strict=True):
                sums[token] = sums[token] + leaf_TM[token] * weight
            y_TM = torch.stack(sums).to(to)
        y_TM.backward(grad_TM.to(to))
        return {"y": y_TM.detach(), "x's gradient": leaf_TM.grad, "weights' gradient": weight_A.grad}

    actual, reference, truth = run(dtype, fast=True), run(dtype, fast=False), run(torch.float64, fast=False)
    for name in actual:
        assert_close(name, actual[name], reference[name], truth[name])
    assert sum(routing.counts) == 30


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 50))
def test_combine_is_the_transpose_of_dispatch(num_tokens: int, num_experts: int, num_entries: int) -> None:
    assignment = _random(num_tokens, num_experts, num_entries)
    routing = route(assignment, num_experts=num_experts)
    x_TM, rows_RM = torch.randn(num_tokens, 3).double(), torch.randn(num_entries, 3).double()
    ours = (combine(rows_RM, routing, num_tokens=num_tokens) * x_TM).sum() + 1
    theirs = (rows_RM * routing.weight_R.double().unsqueeze(1) * dispatch(x_TM, routing)).sum() + 1
    scale = 1 + (rows_RM.abs().sum() * x_TM.abs().max()).detach()
    assert_equal_up_to_rounding("transpose", ours + scale, theirs + scale, roundings=3 * num_entries + 3)


def test_repeats_bitwise() -> None:
    assignment = _random(100, 4, 700)
    rows_RM = torch.randn(700, 8)
    routing = route(assignment, num_experts=4)
    first = combine(rows_RM, routing, num_tokens=100)
    assert all(torch.equal(first, combine(rows_RM, routing, num_tokens=100)) for _ in range(3))


def test_no_tokens() -> None:
    routing = route(_random(0, 3, 0), num_experts=3)
    assert routing.counts == (0, 0, 0)
    rows_RM = dispatch(torch.randn(0, 5), routing)
    assert combine(rows_RM, routing, num_tokens=0).shape == (0, 5)
    assert torch.equal(combine(rows_RM, routing, num_tokens=2), torch.zeros(2, 5))


def test_refuses_an_expert_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="assignment: names expert 3"):
        route(_assignment(torch.tensor([0]), torch.tensor([3]), torch.ones(1)), num_experts=3)
