"""DeepSpeed trains spread experts as one process does on the mean of the ranks' losses, in stages 0, 1 and 2."""

import os

import pytest
import torch
from ranks import run_ranks

from moe_pipeline.parallel import gather_state, spread_parameters
from moe_pipeline.run.ranks import expert_ranks
from tests.moe_pipeline.spread import RATE, STEPS, Net, assert_trained_alike, batch


def _check(rank: int, num_ranks: int, ranks_per_copy: int) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
    import deepspeed

    from scripts.testbed.deepspeed_experts import mark_experts, skip_compilation, split_groups

    skip_compilation()
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    ranks = expert_ranks(ranks_per_copy=ranks_per_copy)
    for stage, accumulated, max_norm in ((0, 1, None), (1, 1, None), (2, 1, None), (1, 1, 0.3), (2, 2, 0.3)):
        model = Net(ranks)
        assert mark_experts(model) == list(spread_parameters(model)) != []
        groups = split_groups([{"params": list(model.parameters())}])
        assert [group.get("moe", False) for group in groups] == [False, True]
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": accumulated,
            "gradient_clipping": max_norm or 0.0,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(groups, lr=RATE), config=config)
        for step in range(STEPS * accumulated):
            engine.backward(engine(*batch(step, rank)))
            engine.step()
        assert_trained_alike(lambda trained=model: gather_state(trained), num_ranks, accumulated=accumulated,
                             max_norm=max_norm)  # type: ignore[misc]  # fmt: skip


def test_every_stage_trains_as_one_process() -> None:
    run_ranks(2, _check, 2)


def test_replicas_of_experts_train_as_one_process() -> None:
    run_ranks(4, _check, 2)


def test_without_spread_experts_nothing_is_done() -> None:
    pytest.importorskip("deepspeed")
    from scripts.testbed.deepspeed_experts import mark_experts, split_groups

    model = Net()
    assert mark_experts(model) == []
    assert not any("deepspeed" in name for name, _ in model.named_modules())
    (group,) = split_groups([{"params": list(model.parameters()), "lr": 1.0}, {"params": []}])
    assert group["lr"] == 1.0
    assert len(group["params"]) == len(list(model.parameters()))
