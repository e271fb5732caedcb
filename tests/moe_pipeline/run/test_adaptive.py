"""A layer that chooses: alike on every rank, with the results of any fixed choice, and an error where ranks differ."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from closeness import assert_all_close
from ranks import run_ranks
from torch import nn

from moe_pipeline import FeedForwardExperts, Gate, GateConfig, ModuleExperts, MoELayer, PipelineConfig
from moe_pipeline.dispatch import local_part
from moe_pipeline.plan.budget import BudgetError
from moe_pipeline.run.adaptive import StepClock
from moe_pipeline.run.comm import RankError
from moe_pipeline.run.ranks import ExpertRanks, expert_ranks

WIDTH, HIDDEN, NUM_EXPERTS = 8, 12, 4


def _layer(pipeline: PipelineConfig, ranks: ExpertRanks | None = None, name: str = "moe") -> MoELayer:
    torch.manual_seed(0)
    gate = Gate(GateConfig(num_experts=NUM_EXPERTS, top_k=2), WIDTH)
    experts = FeedForwardExperts(NUM_EXPERTS, WIDTH, HIDDEN, activation="relu")
    if ranks is not None:
        local_part(experts, ranks)
    return MoELayer(gate, experts, pipeline=pipeline, ranks=ranks, name=name)


def _step(layer: MoELayer, x_TM: torch.Tensor) -> dict[str, torch.Tensor]:
    layer.zero_grad()
    x_TM = x_TM.clone().requires_grad_()
    y_TM, _ = layer(x_TM)
    y_TM.square().sum().backward()
    grads = {name: parameter.grad.clone() for name, parameter in layer.named_parameters() if parameter.grad is not None}
    return {"y": y_TM.detach(), "x": x_TM.grad, **grads}  # type: ignore[dict-item]


def _chosen(layer: MoELayer) -> tuple[int, str]:
    assert layer.adaptive is not None
    assert layer.adaptive.last is not None
    return layer.adaptive.last.fixed_chunks, layer.adaptive.last.fixed_restore


def _same_choices_and_results(rank: int, num_ranks: int) -> None:
    ranks = expert_ranks()
    settings = PipelineConfig(num_chunks="auto", restore="auto", device_budget_bytes=90_000)
    layer, reference = _layer(settings, ranks), _layer(PipelineConfig(), ranks, name="reference")
    exact = _layer(PipelineConfig(), ranks, name="exact").double()
    choices = set()
    for number in range(30):
        tokens = (5, 40, 90)[number % 3] * (rank + 1) // 2  # ranks have different batches, at times none at all
        generator = torch.Generator().manual_seed(100 * number + rank)
        x_TM = torch.randn(tokens, WIDTH, generator=generator)
        assert_all_close(_step(layer, x_TM), _step(reference, x_TM), _step(exact, x_TM.double()))
        chunks, restore = _chosen(layer)
        everywhere = [torch.zeros(2, dtype=torch.int64) for _ in range(num_ranks)]
        dist.all_gather(everywhere, torch.tensor([chunks, ("none", "S1", "S2", "S3", "S4").index(restore)]))
        assert all(torch.equal(choice, everywhere[0]) for choice in everywhere), everywhere
        choices.add(chunks)
    assert len(choices) > 1, "something was tried"


def test_ranks_choose_alike_and_compute_the_same_as_a_fixed_layer() -> None:
    run_ranks(2, _same_choices_and_results)


def _ranks_that_know_different_things(rank: int, num_ranks: int) -> None:
    layer = _layer(PipelineConfig(num_chunks="auto"), expert_ranks())
    _step(layer, torch.randn(4, WIDTH))
    assert layer.adaptive is not None
    if rank:  # as if this rank had seen another past
        layer.adaptive._chooser.observe(123.0)  # type: ignore[union-attr]
    with pytest.raises(RankError, match=r"layer 'moe': ranks know different things of it \(digests"):
        _step(layer, torch.randn(4, WIDTH))


def test_ranks_that_would_choose_differently_end_with_an_error() -> None:
    run_ranks(2, _ranks_that_know_different_things)


def _one_asks_and_one_is_fixed(rank: int, num_ranks: int) -> None:
    chunks: int | str = "auto" if rank else 2
    layer = _layer(PipelineConfig(num_chunks=chunks), expert_ranks())  # type: ignore[arg-type]
    with pytest.raises(RankError, match="num_chunks="):
        _step(layer, torch.randn(4, WIDTH))


def test_a_rank_with_other_settings_ends_with_an_error() -> None:
    run_ranks(2, _one_asks_and_one_is_fixed)


def _evaluation(rank: int, num_ranks: int) -> None:
    layer = _layer(PipelineConfig(num_chunks="auto"), expert_ranks())
    with torch.no_grad():
        for _ in range(6):
            layer(torch.randn(4, WIDTH))
    assert layer.adaptive is not None
    assert layer.adaptive.trial_steps == 0
    for _ in range(6):
        _step(layer, torch.randn(4, WIDTH))
    assert layer.adaptive.trial_steps > 0


def test_evaluation_tries_nothing() -> None:
    run_ranks(2, _evaluation)


def test_one_process_chooses_too(tmp_path: Path) -> None:
    settings = PipelineConfig(num_chunks="auto", restore="auto", cache_folder=str(tmp_path))
    layer = _layer(settings)
    x_TM = torch.randn(30, WIDTH)
    expected = _step(_layer(PipelineConfig()), x_TM)
    for _ in range(3):
        found = _step(layer, x_TM)
    assert _chosen(layer) == (1, "none")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_one_process_within_a_budget_takes_chunks_to_save_memory() -> None:
    x_TM = torch.randn(400, WIDTH)
    with pytest.raises(BudgetError) as caught:
        _step(_layer(PipelineConfig(num_chunks="auto", device_budget_bytes=10)), x_TM)
    least = int(str(caught.value).split("device_budget_bytes=")[1].split(" ")[0])
    layer = _layer(PipelineConfig(num_chunks="auto", device_budget_bytes=least))
    _step(layer, x_TM)
    assert _chosen(layer)[0] > 1


def test_an_impossible_budget_is_an_error_of_the_call() -> None:
    layer = _layer(PipelineConfig(num_chunks="auto", restore="auto", device_budget_bytes=10))
    with pytest.raises(BudgetError, match="device_budget_bytes: got 10"):
        layer(torch.randn(30, WIDTH))


def test_a_budget_needs_experts_that_the_ledger_knows() -> None:
    modules = ModuleExperts([nn.Linear(WIDTH, WIDTH) for _ in range(NUM_EXPERTS)])
    gate = Gate(GateConfig(num_experts=NUM_EXPERTS, top_k=2), WIDTH)
    x_TM = torch.randn(30, WIDTH)
    MoELayer(gate, modules, pipeline=PipelineConfig(num_chunks="auto"))(x_TM)
    limited = MoELayer(gate, modules, pipeline=PipelineConfig(num_chunks="auto", device_budget_bytes=10**9))
    with pytest.raises(ValueError, match="device_budget_bytes: got 1000000000 for ModuleExperts"):
        limited(x_TM)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copied_layer_searches_by_itself(copied: Callable[[MoELayer], MoELayer]) -> None:
    layer = _layer(PipelineConfig(num_chunks="auto", restore="auto"))
    _step(layer, torch.randn(30, WIDTH))
    other = copied(layer)
    assert other.adaptive is not None
    assert other.adaptive.last is None
    _step(other, torch.randn(30, WIDTH))
    assert _chosen(other) == (1, "none")


def test_a_clock_counts_once_both_passes_are_over() -> None:
    clock = StepClock(torch.device("cpu"))
    assert clock.step_us() == 0
    with clock.running():
        pass
    assert clock.step_us() == 0
    with clock.running():
        pass
    assert clock.step_us() > 0
