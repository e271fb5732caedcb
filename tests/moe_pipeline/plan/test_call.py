"""What one call decides: each part is what its own module says, and equal calls share their schedules."""

from itertools import product

import pytest

from moe_pipeline.config import PipelineConfig
from moe_pipeline.plan.call import plan_call
from moe_pipeline.plan.partition import Partition, partition
from moe_pipeline.plan.schedule import backward_schedule, forward_schedule
from moe_pipeline.plan.strategy import ring_depths, strategy


def _partition(num_ranks: int, num_experts: int, num_chunks: int) -> Partition:
    counts = tuple(tuple(3 + rank + expert for expert in range(num_experts)) for rank in range(num_ranks))
    return partition(counts, counts, num_chunks=num_chunks)


@pytest.mark.parametrize("restore", ["none", "S1", "S2", "S3", "S4"])
def test_a_plan_is_made_of_the_parts(restore: str) -> None:
    chosen = strategy(restore)  # type: ignore[arg-type]
    for num_ranks, num_chunks, overlap, for_dgrad in product((1, 2), (1, 3), (False, True), (False, True)):
        config = PipelineConfig(num_chunks=num_chunks, restore=restore, overlap=overlap)  # type: ignore[arg-type]
        cut, depths = _partition(num_ranks, 2, num_chunks), ring_depths(chosen, num_chunks)
        plan = plan_call("encoder", config, cut, input_for_dgrad=for_dgrad)
        settings = {"exchanges": num_ranks > 1, "overlap": overlap}
        assert (plan.layer, plan.config, plan.partition) == ("encoder", config, cut)
        assert (plan.strategy, plan.depths, plan.input_for_dgrad) == (chosen, depths, for_dgrad)
        assert plan.forward == forward_schedule(num_chunks, chosen, depths, **settings)
        assert plan.backward == backward_schedule(num_chunks, chosen, depths, input_for_dgrad=for_dgrad, **settings)


@pytest.mark.parametrize(
    ("num_ranks", "num_experts", "exchanges", "sorts"),
    [(1, 1, False, False), (1, 4, False, False), (2, 1, True, False), (2, 2, True, True)],
)
def test_rows_are_sent_to_others_and_sorted_only_where_there_is_need(
    num_ranks: int, num_experts: int, exchanges: bool, sorts: bool
) -> None:
    plan = plan_call("moe", PipelineConfig(num_chunks=2), _partition(num_ranks, num_experts, 2))
    assert (plan.exchanges, plan.sorts) == (exchanges, sorts)
    assert any(op.stage == "dispatch" for op in plan.forward.ops) == exchanges


def test_calls_with_other_counts_share_their_schedules() -> None:
    config = PipelineConfig(num_chunks=3, restore="S1")
    first, second = (plan_call("moe", config, _partition(2, experts, 3)) for experts in (1, 4))
    assert first.forward is second.forward
    assert first.backward is second.backward
    other = plan_call("moe", PipelineConfig(num_chunks=3, restore="S4"), _partition(2, 1, 3))
    assert other.backward != first.backward
