"""Experts spread over ranks train as one process does on the mean of the ranks' losses, whatever averages the rest."""

import copy

import pytest
import torch
import torch.distributed as dist
from closeness import assert_all_close, assert_equal_up_to_rounding
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from moe_pipeline.parallel import (
    clip_grad_norm,
    exclude_experts,
    gather_state,
    leave_gradients,
    local_state,
    spread_parameters,
)
from moe_pipeline.run.ranks import expert_ranks
from tests.moe_pipeline.spread import RATE, STEPS, Net, assert_trained_alike, batch


def _train(
    model: nn.Module, inner: Net, rank: int, *, accumulated: int = 1, max_norm: float | None = None, sync: bool = True
) -> None:
    optimizer = torch.optim.SGD(inner.parameters(), lr=RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(accumulated):
            inputs = batch(step * accumulated + part, rank)
            if not sync and part < accumulated - 1:
                with model.no_sync():  # type: ignore[operator]
                    (model(*inputs) / accumulated).backward()
            else:
                (model(*inputs) / accumulated).backward()
        if max_norm is not None:
            clip_grad_norm(inner, max_norm)
        optimizer.step()


def _check_ddp(rank: int, num_ranks: int, ranks_per_copy: int, listed: bool) -> None:
    ranks = expert_ranks(ranks_per_copy=ranks_per_copy)
    for accumulated, max_norm, sync in ((1, None, True), (2, None, True), (2, None, False), (1, 0.3, True)):
        model = Net(ranks, listed=listed)
        assert exclude_experts(model) == list(spread_parameters(model))
        _train(DistributedDataParallel(model), model, rank, accumulated=accumulated, max_norm=max_norm, sync=sync)
        settings = {"accumulated": accumulated, "max_norm": max_norm, "listed": listed}
        assert_trained_alike(lambda trained=model: gather_state(trained), num_ranks, **settings)  # type: ignore[misc]
        for parameter in model.parameters():  # replicas hold the same bits
            first = parameter.detach().clone()
            group = ranks.replicas if parameter in set(model.middle.moe.experts.parameters()) else dist.group.WORLD
            dist.broadcast(first, group=group, group_src=0)
            assert torch.equal(first, parameter)


def _check_copies(rank: int, num_ranks: int) -> None:
    """A deep copy, which leaves hooks behind, averages all the same; experts frozen at first, too."""
    model = Net(expert_ranks())
    model.middle.moe.experts.requires_grad_(False)
    frozen = copy.deepcopy(model)
    assert list(spread_parameters(frozen)) == list(spread_parameters(model)) != []
    frozen.middle.moe.experts.requires_grad_(True)
    exclude_experts(frozen)
    _train(DistributedDataParallel(frozen), frozen, rank)
    assert_trained_alike(lambda: gather_state(frozen), num_ranks)


def _check_guard(rank: int, num_ranks: int) -> None:
    ranks = expert_ranks()
    message = "layer 'middle': DistributedDataParallel has taken its experts for copies.*exclude_experts"
    with pytest.raises(RuntimeError, match=message):
        DistributedDataParallel(Net(ranks))(*batch(0, rank))
    outer = nn.ModuleDict({"net": Net(ranks)})
    exclude_experts(outer["net"])  # names are relative to another module than the one that is wrapped
    outer.forward = outer["net"].forward  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match=message):
        DistributedDataParallel(outer)(*batch(0, rank))
    assert exclude_experts(nn.Linear(2, 2)) == []


def _check_norm(rank: int, num_ranks: int) -> None:
    whole, model = Net(), Net(expert_ranks())
    exclude_experts(model)
    wrapped = DistributedDataParallel(model)
    wrapped(*batch(0, rank)).backward()
    (sum(whole(*batch(0, other)) for other in range(num_ranks)) / num_ranks).backward()
    expected = nn.utils.clip_grad_norm_(whole.parameters(), float("inf"))
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    assert_equal_up_to_rounding("norm", clip_grad_norm(model, float("inf")), expected, roundings=16)
    assert all(torch.equal(parameter.grad, before[name]) for name, parameter in model.named_parameters())
    norms = [torch.empty(()) for _ in range(num_ranks)]
    dist.all_gather(norms, clip_grad_norm(model, 0.1))
    assert len({float(norm) for norm in norms}) == 1
    model.zero_grad()
    assert clip_grad_norm(model, 0.1) == 0


def _check_fsdp(rank: int, num_ranks: int) -> None:
    model = Net(expert_ranks())
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (num_ranks,)),
                ignored_params=set(spread_parameters(model).values()))  # fmt: skip
    _train(model, model, rank, max_norm=0.3)

    def state() -> dict[str, torch.Tensor]:
        whole = gather_state(model)
        return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in whole.items()}

    assert_trained_alike(state, num_ranks, max_norm=0.3)


def _check_state(rank: int, num_ranks: int, listed: bool) -> None:
    whole, model = Net(listed=listed).state_dict(), Net(expert_ranks(), listed=listed)
    gathered = gather_state(model)
    assert list(gathered.keys()) == list(whole.keys()) or listed
    assert_all_close(gathered, whole, whole)
    state = {name: value + 1 for name, value in whole.items()}
    model.load_state_dict(local_state(model, state))
    assert_all_close(gather_state(model), state, state)
    with pytest.raises(RuntimeError, match=r"Missing key.*experts"):
        model.load_state_dict(local_state(model, {}))


def _check_left(rank: int, num_ranks: int) -> None:
    averaged, left = Net(expert_ranks()), Net(expert_ranks())
    assert leave_gradients(left) == list(spread_parameters(left)) != []
    for model in (averaged, left):
        model(*batch(0, rank)).backward()
    for name, parameter in spread_parameters(left).items():
        assert torch.equal(parameter.grad / num_ranks, averaged.get_parameter(name).grad)  # type: ignore[operator]


def _check_two(rank: int, num_ranks: int) -> None:
    for listed in (False, True):
        _check_ddp(rank, num_ranks, 2, listed)
        _check_state(rank, num_ranks, listed)
    _check_copies(rank, num_ranks)
    _check_norm(rank, num_ranks)
    _check_left(rank, num_ranks)
    _check_fsdp(rank, num_ranks)
    _check_guard(rank, num_ranks)


def test_two_ranks_train_as_one_process() -> None:
    run_ranks(2, _check_two)


def _check_four(rank: int, num_ranks: int) -> None:
    _check_ddp(rank, num_ranks, 2, False)
    _check_ddp(rank, num_ranks, 1, True)


def test_replicas_of_experts_train_as_one_process() -> None:
    run_ranks(4, _check_four)


def test_clipping_without_ranks_is_torchs() -> None:
    ours, theirs = Net(), Net()
    for model in (ours, theirs):
        model(*batch(0, 0)).backward()
    norms = clip_grad_norm(ours, 0.1), nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
    assert_equal_up_to_rounding("norm", *norms, roundings=16)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert_equal_up_to_rounding(name, mine.grad, other.grad, roundings=16)


def test_nothing_is_spread_in_one_process() -> None:
    model = Net()
    assert exclude_experts(model) == leave_gradients(model) == list(spread_parameters(model)) == []
    whole = model.state_dict()
    assert gather_state(model).keys() == local_state(model, whole).keys() == whole.keys()
    _train(model, model, 0)
    assert_trained_alike(model.state_dict, 1)
