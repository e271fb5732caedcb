"""Rows in the order they travel, and the way back to their tokens, for any entries a gate could return."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moe_pipeline.config import Split
from moe_pipeline.gate import Assignment
from moe_pipeline.losses import RouterLosses
from moe_pipeline.plan.partition import Partition, partition
from moe_pipeline.routing import Routing, expert_counts, route

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


def _cut(assignment: Assignment, num_ranks: int, local: int, num_chunks: int, split: Split, rank: int) -> Partition:
    counts = expert_counts(assignment, num_experts=num_ranks * local)
    sent = tuple(counts[start : start + local] for start in range(0, len(counts), local))
    return partition(sent, sent, num_chunks=num_chunks, split=split, rank=rank)


def _check(assignment: Assignment, cut: Partition, routing: Routing, num_tokens: int, local: int) -> None:
    tokens, weights = assignment.token_A.tolist(), assignment.weight_A.tolist()
    owners = assignment.expert_A.tolist()
    rows_of: dict[int, list[int]] = {}  # expert -> its entries, in the assignment's order
    for entry, expert in enumerate(owners):
        rows_of.setdefault(expert, []).append(entry)
    order = [
        entry
        for chunk in cut.sent
        for rank, parts in enumerate(chunk)
        for expert, part in enumerate(parts)
        for entry in rows_of.get(rank * local + expert, [])[part.start : part.stop]
    ]
    assert routing.token_S.tolist() == [tokens[entry] for entry in order]
    assert routing.weight_S.tolist() == [weights[entry] for entry in order]
    most = max(Counter(tokens).values(), default=0)
    assert routing.row_TK.shape == (num_tokens, most)
    for token, rows in enumerate(routing.row_TK.tolist()):
        own = [row for row, owner in enumerate(routing.token_S.tolist()) if owner == token]
        assert rows == own + [len(order)] * (most - len(own))


@given(
    st.integers(0, 20), st.integers(1, 3), st.integers(1, 3), st.integers(0, 50), st.integers(1, 8),
    st.sampled_from(["tokens", "local"]), st.data(),
)  # fmt: skip
def test_rows_travel_by_chunk_then_expert_and_find_their_tokens_again(
    num_tokens: int, num_ranks: int, local: int, num_entries: int, num_chunks: int, split: Split, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, num_ranks - 1))
    assignment = _random(num_tokens, num_ranks * local, num_entries)
    cut = _cut(assignment, num_ranks, local, num_chunks, split, rank)
    _check(assignment, cut, route(assignment, cut, num_tokens=num_tokens), num_tokens, local)


@given(st.integers(0, 20), st.integers(1, 4), st.integers(1, 3), st.integers(0, 50), st.data())
def test_rows_travel_to_one_rank_after_the_other(
    num_tokens: int, num_ranks: int, local: int, num_entries: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, num_ranks - 1))
    assignment = _random(num_tokens, num_ranks * local, num_entries)
    cut = _cut(assignment, num_ranks, local, num_ranks, "ranks", rank)
    routing = route(assignment, cut, num_tokens=num_tokens)
    _check(assignment, cut, routing, num_tokens, local)
    per_rank = [0] * num_ranks
    for expert in assignment.expert_A.tolist():
        per_rank[expert // local] += 1
    assert [sum(cut.sent_rows(chunk)) for chunk in range(num_ranks)] == [
        per_rank[(rank + chunk) % num_ranks] for chunk in range(num_ranks)
    ]


def test_weights_of_rows_are_differentiable() -> None:
    assignment = _random(9, 4, 30)
    factor_S = torch.arange(30.0)
    routing = route(assignment, _cut(assignment, 1, 4, 3, "tokens", 0), num_tokens=9)
    (routing.weight_S * factor_S).sum().backward()
    same_S = torch.stack([(assignment.weight_A == weight).nonzero()[0, 0] for weight in routing.weight_S])
    assert torch.equal(assignment.weight_A.grad[same_S], factor_S)  # type: ignore[index]


def test_equally_many_rows_per_token_leave_no_place_open() -> None:
    token_A, expert_A = torch.tensor([1, 0, 0, 1]), torch.tensor([1, 0, 1, 0])
    assignment = _assignment(token_A, expert_A, torch.rand(4))
    routing = route(assignment, _cut(assignment, 1, 2, 1, "tokens", 0), num_tokens=2)
    assert routing.token_S.tolist() == [0, 1, 1, 0]
    assert routing.row_TK.tolist() == [[0, 3], [1, 2]]


def test_repeats_bitwise() -> None:
    assignment = _random(100, 4, 700)
    cut = _cut(assignment, 2, 2, 3, "tokens", 1)
    first, second = route(assignment, cut, num_tokens=100), route(assignment, cut, num_tokens=100)
    assert torch.equal(first.token_S, second.token_S)
    assert torch.equal(first.row_TK, second.row_TK)


def test_no_tokens_and_tokens_without_experts() -> None:
    none = _random(0, 3, 0)
    cut = _cut(none, 1, 3, 2, "tokens", 0)
    assert route(none, cut, num_tokens=0).row_TK.shape == (0, 0)
    assert route(none, cut, num_tokens=2).row_TK.shape == (2, 0)


@given(st.integers(1, 6), st.integers(0, 50))
def test_counts_are_those_of_the_entries(num_experts: int, num_entries: int) -> None:
    assignment = _random(10, num_experts, num_entries)
    owners = assignment.expert_A.tolist()
    expected = tuple(owners.count(expert) for expert in range(num_experts))
    assert expert_counts(assignment, num_experts=num_experts) == expected


def test_refuses_an_expert_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="assignment: names expert 3; accepted are 0 to 2"):
        expert_counts(_assignment(torch.tensor([0]), torch.tensor([3]), torch.ones(1)), num_experts=3)
