"""Groups come from a mesh with all validation in one place; marks, sums, stacks and averages over them."""

import copy

import pytest
import torch
import torch.distributed as dist
from closeness import assert_all_close
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from moe_pipeline.run.ranks import (
    average_over_ranks,
    expert_ranks,
    gather_experts,
    mark_spread,
    spread_of,
    sum_over_experts,
)


def test_groups_need_a_started_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    with pytest.raises(RuntimeError, match=r"expert_ranks: torch\.distributed has not been started"):
        expert_ranks()


def _check_groups(rank: int, num_ranks: int) -> None:
    every = expert_ranks()
    assert (every.rank, every.size, every.replicas.size()) == (rank, 4, 1)
    halves = expert_ranks(ranks_per_copy=2)
    assert (halves.rank, halves.size, halves.replicas.size()) == (rank % 2, 2, 2)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "expert"))
    of_mesh = expert_ranks(mesh)
    assert (of_mesh.rank, of_mesh.size, of_mesh.replicas.size()) == (rank % 2, 2, 2)
    turned = expert_ranks(init_device_mesh("cpu", (2, 2), mesh_dim_names=("expert", "replica")))
    assert (turned.rank, turned.size) == (rank // 2, 2)
    assert copy.deepcopy(halves) is halves
    assert halves.local_experts(6) == 3
    for size in (0, -1, 3, 8):
        with pytest.raises(ValueError, match=f"ranks_per_copy: got {size} for 4 ranks; accepted is a divisor of 4"):
            expert_ranks(ranks_per_copy=size)
    with pytest.raises(ValueError, match="ranks_per_copy: got 2 together with a mesh"):
        expert_ranks(mesh, ranks_per_copy=2)
    for names in (("data", "model"), ("replica", "model"), ("data", "expert")):
        with pytest.raises(ValueError, match=rf"mesh: got axes \('{names[0]}', '{names[1]}'\).*'replica' and 'expert'"):
            expert_ranks(init_device_mesh("cpu", (2, 2), mesh_dim_names=names))
    with pytest.raises(ValueError, match=r"mesh: got axes \(\)"):
        expert_ranks(init_device_mesh("cpu", (4,)))
    with pytest.raises(ValueError, match="num_experts: got 6 for 4 ranks; accepted is a multiple of 4"):
        every.local_experts(6)


def _check_sums(rank: int, num_ranks: int) -> None:
    ranks = expert_ranks()
    value = torch.tensor([1.0, rank])
    assert sum_over_experts(value, ranks).tolist() == [num_ranks, sum(range(num_ranks))]
    assert value.tolist() == [1.0, rank]
    whole = gather_experts(torch.tensor([[rank, 0], [rank, 1]]), ranks)
    assert whole.tolist() == [[source, expert] for source in range(num_ranks) for expert in range(2)]
    assert gather_experts(torch.arange(6).view(2, 3).t(), ranks).shape == (3 * num_ranks, 2)  # not contiguous


def _check_marks(rank: int, num_ranks: int) -> None:
    ranks = expert_ranks()
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    assert spread_of(first) is None
    assert mark_spread([first], ranks)
    mark = spread_of(first)
    assert mark is not None
    assert mark.ranks is ranks
    mark.averages = False
    assert not mark_spread([first, second], ranks)  # what one knows stays
    assert spread_of(first) is mark
    assert mark_spread([second], ranks)


def _check_averages(rank: int, num_ranks: int) -> None:
    """Two copies of the experts on two ranks each: the gradient is the mean over the losses of all four."""
    ranks = expert_ranks(ranks_per_copy=2)
    own = torch.full((3,), rank + 1.0)
    grad, frozen = average_over_ranks([own, None], ranks)
    assert frozen is None
    assert grad is own
    copies = [rank % 2 + 1, rank % 2 + 3]  # the values of the two ranks that hold these experts
    expected = torch.full((3,), sum(copies) / num_ranks)
    assert_all_close({"grad": grad}, {"grad": expected}, {"grad": expected})  # type: ignore[dict-item]


def _check_all(rank: int, num_ranks: int) -> None:
    _check_groups(rank, num_ranks)
    _check_marks(rank, num_ranks)
    _check_sums(rank, num_ranks)
    _check_averages(rank, num_ranks)


def test_groups_come_from_a_mesh_or_a_number_and_gradients_are_averaged_over_copies() -> None:
    run_ranks(4, _check_all)
