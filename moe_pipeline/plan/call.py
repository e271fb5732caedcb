"""All that is decided for one call of a layer: who sends what in which chunk, in which order, with which buffers."""

import functools
from dataclasses import dataclass

from moe_pipeline.config import PipelineConfig, Restore
from moe_pipeline.plan.partition import Partition
from moe_pipeline.plan.schedule import Schedule, backward_schedule, forward_schedule
from moe_pipeline.plan.strategy import RingDepths, Strategy, ring_depths, strategy


@dataclass(frozen=True, kw_only=True)
class CallPlan:
    """The decisions of one call.

    Source: MPipeMoE (arXiv:2506.22175) section III.
    """

    layer: str
    """Name of the layer, for errors and timelines."""
    config: PipelineConfig
    partition: Partition
    strategy: Strategy
    depths: RingDepths
    forward: Schedule
    backward: Schedule
    input_for_dgrad: bool
    """Whether the experts need T_DI for the gradient of T_DI."""

    @property
    def exchanges(self) -> bool:
        """Whether rows travel to other ranks; not in the paper."""
        return len(self.partition.sent[0]) > 1

    @property
    def sorts(self) -> bool:
        """Whether received rows, which come ordered by rank, must be ordered by expert; not in the paper."""
        return self.exchanges and self.partition.num_experts > 1


def plan_call(layer: str, config: PipelineConfig, partition: Partition, *, input_for_dgrad: bool = False) -> CallPlan:
    """Decide a call.

    Args:
        layer: Name of the layer.
        config: What the user asked for.
        partition: Rows of every chunk.
        input_for_dgrad: As for `backward_schedule`.

    Returns:
        The plan.

    Source: MPipeMoE (arXiv:2506.22175) section III.
    """
    exchanges = len(partition.sent[0]) > 1
    forward, backward = _schedules(
        partition.num_chunks, config.fixed_restore, config.overlap, exchanges, input_for_dgrad
    )
    chosen = strategy(config.fixed_restore)
    return CallPlan(
        layer=layer,
        config=config,
        partition=partition,
        strategy=chosen,
        depths=ring_depths(chosen, partition.num_chunks),
        forward=forward,
        backward=backward,
        input_for_dgrad=input_for_dgrad,
    )


@functools.cache
def _schedules(
    num_chunks: int, restore: Restore, overlap: bool, exchanges: bool, input_for_dgrad: bool
) -> tuple[Schedule, Schedule]:
    chosen = strategy(restore)
    depths = ring_depths(chosen, num_chunks)
    return (
        forward_schedule(num_chunks, chosen, depths, exchanges=exchanges, overlap=overlap),
        backward_schedule(
            num_chunks, chosen, depths, exchanges=exchanges, overlap=overlap, input_for_dgrad=input_for_dgrad
        ),
    )
