"""What the operations of a step do, summed, against what is known of the whole step."""

from collections.abc import Iterable
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_pipeline.config import PipelineConfig, Restore, Split
from moe_pipeline.plan.call import CallPlan, plan_call
from moe_pipeline.plan.device import Speed
from moe_pipeline.plan.ledger import LayerShape, balanced_partition, ledger
from moe_pipeline.plan.partition import Partition, partition
from moe_pipeline.plan.rings import ALIGNMENT_BYTES, HiddenShape
from moe_pipeline.plan.schedule import Op, Schedule
from moe_pipeline.plan.strategy import strategy
from moe_pipeline.plan.work import CallWork, Work
from tests.moe_pipeline.machine import machine

RESTORES: tuple[Restore, ...] = ("none", "S1", "S2", "S3", "S4")
SPLITS: tuple[Split, ...] = ("tokens", "local")
HIDDEN = {
    "relu": HiddenShape(d_hidden=12, gated=False, in_place=True),
    "gelu": HiddenShape(d_hidden=12, gated=False, in_place=False),
    "swiglu": HiddenShape(d_hidden=12, gated=True, in_place=False),
}
WIDTH = 6


def _shape(num_ranks: int, num_experts: int, tokens: int, **changes: object) -> LayerShape:
    sizes = {"top_k": 2, "d_model": WIDTH, "hidden": HIDDEN["relu"], "element_bytes": 4, **changes}
    return LayerShape(tokens=tokens, num_experts=num_experts, num_ranks=num_ranks, **sizes)  # type: ignore[arg-type]


@st.composite
def _calls(draw: st.DrawFn) -> tuple[LayerShape, CallPlan, int]:
    """A layer, a call of it with ragged or balanced counts, and the rank whose call it is."""
    num_ranks, local, num_chunks = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    config = PipelineConfig(
        num_chunks=num_chunks, restore=draw(st.sampled_from(RESTORES)), split=draw(st.sampled_from(SPLITS))
    )
    rank = draw(st.integers(0, num_ranks - 1))
    hidden = draw(st.sampled_from(sorted(HIDDEN)))
    shape = _shape(num_ranks, num_ranks * local, draw(st.integers(1, 40)), hidden=HIDDEN[hidden])
    cut = balanced_partition(shape, config)
    if draw(st.booleans()):
        rows = st.integers(0, 9)
        sent, received = (
            tuple(tuple(draw(rows) for _ in range(local)) for _ in range(num_ranks)) for _ in ("sent", "received")
        )
        received = (*received[:rank], sent[rank], *received[rank + 1 :])
        cut = partition(sent, received, num_chunks=num_chunks, split=config.split, rank=rank)
    else:
        rank = 0
    return shape, plan_call("moe", config, cut), rank


def _works(schedule: Schedule, work: CallWork, *stages: str) -> list[Work]:
    return [work.of(op) for op in schedule.ops if not stages or op.stage in stages]


def _flops(works: Iterable[Work]) -> float:
    return sum(sum(one.products) for one in works)


def _received(cut: Partition) -> int:
    return sum(sum(cut.received_rows(chunk)) for chunk in range(cut.num_chunks))


@given(_calls())
def test_products_are_three_times_forwards_and_recomputing_adds_the_first(
    call: tuple[LayerShape, CallPlan, int],
) -> None:
    shape, plan, rank = call
    work = CallWork(plan, shape, rank=rank)
    rows, hidden = _received(plan.partition), shape.hidden
    first, second = 2 * rows * WIDTH * hidden.width, 2 * rows * WIDTH * hidden.d_hidden
    assert _flops(_works(plan.forward, work, "up")) == first
    assert _flops(_works(plan.forward, work)) == first + second
    again = first if plan.strategy.hidden == "recompute" else 0
    assert _flops(_works(plan.backward, work)) == 2 * (first + second) + again
    assert _flops(_works(plan.backward, work, "recompute")) == again


@given(_calls())
def test_there_is_a_product_per_expert_that_has_rows(call: tuple[LayerShape, CallPlan, int]) -> None:
    shape, plan, rank = call
    work = CallWork(plan, shape, rank=rank)
    for chunk in range(plan.partition.num_chunks):
        counts = [rows for rows in plan.partition.expert_rows(chunk) if rows]
        expected = [2.0 * rows * WIDTH * shape.hidden.width for rows in counts]
        assert list(work.of(Op("up", chunk)).products) == expected
        assert len(work.of(Op("dgrad", chunk)).products) == len(work.of(Op("wgrad", chunk)).products) == 2 * len(counts)


@given(_calls())
def test_copies_are_the_ledgers_host_bytes_in_both_directions(call: tuple[LayerShape, CallPlan, int]) -> None:
    shape, plan, rank = call
    work = CallWork(plan, shape, rank=rank)
    host_bytes = ledger(shape, plan.config, plan.partition).host_bytes
    copies = (plan.strategy.dispatched == "offload") + (plan.strategy.hidden == "offload")
    for schedule in (plan.forward, plan.backward):
        copied = sum(one.copy_bytes for one in _works(schedule, work))
        assert 0 <= host_bytes - copied <= copies * plan.partition.num_chunks * (ALIGNMENT_BYTES - 1)


@given(_calls())
def test_messages_are_the_rows_of_the_busier_direction(call: tuple[LayerShape, CallPlan, int]) -> None:
    shape, plan, rank = call
    work, cut = CallWork(plan, shape, rank=rank), plan.partition
    for chunk in range(cut.num_chunks):
        leaving = [rows for other, rows in enumerate(cut.sent_rows(chunk)) if other != rank]
        coming = [rows for other, rows in enumerate(cut.received_rows(chunk)) if other != rank]
        expected = 4 * WIDTH * max(sum(leaving), sum(coming))
        found = {
            one.message_bytes
            for schedule in (plan.forward, plan.backward)
            for op in schedule.stream("comm")
            if op.chunk == chunk and (one := work.of(op))
        }
        assert found == ({expected} if shape.num_ranks > 1 else set())


@pytest.mark.parametrize("restore", RESTORES)
def test_a_balanced_step_sends_what_table_2_says(restore: Restore) -> None:
    """Of 4 ranks each sends 3/4 of its rows: 4 all-to-alls a step, 5 where T_DI is sent again."""
    shape = _shape(4, 8, tokens=64)
    for num_chunks, split in product((1, 4), SPLITS):
        config = PipelineConfig(num_chunks=num_chunks, restore=restore, split=split)
        plan = plan_call("moe", config, balanced_partition(shape, config))
        work = CallWork(plan, shape)
        sent = sum(one.message_bytes for part in (plan.forward, plan.backward) for one in _works(part, work))
        resends = strategy(restore).dispatched == "resend"
        assert sent == (5 if resends else 4) * 2 * 64 * 3 // 4 * WIDTH * 4


def test_each_operation_does_one_kind_of_work() -> None:
    """Products and rows go together on the compute stream; messages and copies stand alone on theirs."""
    shape = _shape(2, 4, tokens=40, hidden=HIDDEN["swiglu"])
    for restore in RESTORES:
        config = PipelineConfig(num_chunks=2, restore=restore)
        plan = plan_call("moe", config, balanced_partition(shape, config))
        work = CallWork(plan, shape)
        for op in (*plan.forward.ops, *plan.backward.ops):
            one = work.of(op)
            kinds = {"compute": bool(one.products or one.rows_bytes), "comm": bool(one.message_bytes),
                     "copy": bool(one.copy_bytes)}  # fmt: skip
            assert [stream for stream, does in kinds.items() if does] == [op.stream], op


def test_rows_that_are_moved_by_hand() -> None:
    """One rank, one chunk, 10 tokens of 2 rows: 20 rows of 24 bytes, T_M 12 (or 24) wide, 48 bytes an activation."""
    row, activated = 20 * 24, 20 * 48
    parameters = 2 * 6 * 12 * 4 * 2  # two experts of two matrices

    def rows_bytes(kind: str, stage: str, restore: Restore = "none") -> float:
        shape, config = _shape(1, 2, tokens=10, hidden=HIDDEN[kind]), PipelineConfig(restore=restore)
        plan = plan_call("moe", config, balanced_partition(shape, config))
        return CallWork(plan, shape).of(Op(stage, 0)).rows_bytes  # type: ignore[arg-type]

    assert rows_bytes("relu", "gather") == 2 * row
    assert rows_bytes("relu", "gather_grad") == 7 * row
    assert rows_bytes("relu", "sum") == 9 * row / 2
    assert rows_bytes("relu", "sum_grad") == 7 * row / 2
    assert rows_bytes("relu", "up") == 2 * activated  # in place
    assert rows_bytes("gelu", "up") == 0
    assert rows_bytes("relu", "down") == 0
    assert rows_bytes("gelu", "down") == 2 * activated
    assert rows_bytes("swiglu", "down") == 5 * activated
    assert rows_bytes("relu", "dgrad") == 3 * activated
    assert rows_bytes("swiglu", "dgrad") == 9 * activated
    assert rows_bytes("swiglu", "dgrad", "S4") == 11 * activated  # the activation is computed once more
    assert rows_bytes("relu", "wgrad") == parameters
    assert rows_bytes("gelu", "wgrad") == parameters
    assert rows_bytes("gelu", "wgrad", "S4") == 2 * activated + parameters
    assert rows_bytes("swiglu", "wgrad") == 3 * activated + parameters * 3 // 2


def test_rows_are_sorted_only_where_ranks_have_several_experts_and_later_chunks_add_to_gradients() -> None:
    config = PipelineConfig(num_chunks=2)
    for num_experts, sorts in ((2, False), (4, True)):
        shape = _shape(2, num_experts, tokens=40)
        plan = plan_call("moe", config, balanced_partition(shape, config))
        work = CallWork(plan, shape)
        rows = sum(plan.partition.received_rows(1))
        sorting = 2 * rows * 24 * sorts
        assert work.of(Op("up", 1)).rows_bytes == 2 * rows * 48 + sorting
        assert work.of(Op("down", 1)).rows_bytes == sorting
        assert work.of(Op("dgrad", 1)).rows_bytes == 3 * rows * 48 + 2 * sorting
        added = work.of(Op("wgrad", 1)).rows_bytes - work.of(Op("wgrad", 0)).rows_bytes
        assert added == shape.parameter_bytes


def test_times_add_up_and_every_product_has_its_latency() -> None:
    device = machine(
        product=Speed(5.0, ((1.0, 1e6),)),
        rows=Speed(1.0, ((1.0, 2e6),)),
        message=Speed(2.0, ((1.0, 4e6),)),
        copy=Speed(3.0, ((1.0, 8e6),)),
    )
    whole = Work(products=(10.0, 20.0), rows_bytes=8.0, message_bytes=16.0, copy_bytes=32.0)
    assert whole.time_us(device, 2) == (5 + 10 + 5 + 20) + (1 + 4) + (2 + 4) + (3 + 4)
    assert whole.time_us(device, 1) == (5 + 10 + 5 + 20) + (1 + 4) + (3 + 4)
    assert Work().time_us(device, 2) == 0
