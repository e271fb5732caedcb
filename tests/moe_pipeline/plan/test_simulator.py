"""The simulator against recursions and formulas that know nothing of it, and against examples worked by hand."""

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_pipeline.config import PipelineConfig, Restore
from moe_pipeline.plan.call import plan_call
from moe_pipeline.plan.device import Device, interference
from moe_pipeline.plan.ledger import LayerShape, balanced_partition
from moe_pipeline.plan.partition import partition
from moe_pipeline.plan.rings import HiddenShape
from moe_pipeline.plan.schedule import Op, Schedule, Stream, backward_schedule, forward_schedule
from moe_pipeline.plan.simulator import run_schedule, simulate, step_us
from moe_pipeline.plan.strategy import ring_depths, strategy
from moe_pipeline.plan.work import CallWork
from tests.moe_pipeline.machine import NOTHING, STREAMS, UNIT, alphas, machine

RESTORES: tuple[Restore, ...] = ("none", "S1", "S2", "S3", "S4")
TIMES = st.integers(0, 1000)  # whole microseconds: sums of them are exact
Spans = list[tuple[float, float]]


def _schedule(
    num_chunks: int, restore: Restore, *, backward: bool, overlap: bool = True, alone: bool = False
) -> Schedule:
    chosen = strategy(restore)
    build = backward_schedule if backward else forward_schedule
    return build(num_chunks, chosen, ring_depths(chosen, num_chunks), exchanges=not alone, overlap=overlap)


@st.composite
def _schedules(draw: st.DrawFn, *, overlap: bool | None = None) -> tuple[Schedule, list[int]]:
    schedule = _schedule(
        draw(st.integers(1, 6)),
        draw(st.sampled_from(RESTORES)),
        backward=draw(st.booleans()),
        overlap=draw(st.booleans()) if overlap is None else overlap,
        alone=draw(st.booleans()),
    )
    return schedule, [draw(TIMES) for _ in schedule.ops]


@st.composite
def _machines(draw: st.DrawFn, *, one_thread: bool | None = None, at_once: int | None = None) -> Device:
    """Any interference; how operations are issued and how messages travel, unless it is given."""
    factor = st.sampled_from([0.25, 0.5, 1.0])
    table = {y: {x: draw(factor) for x in (*STREAMS, "all") if x != y} for y in STREAMS}
    return machine(
        interference=interference(table),
        one_thread=draw(st.booleans()) if one_thread is None else one_thread,
        messages_at_once=draw(st.integers(1, 2)) if at_once is None else at_once,
    )


def _end(spans: Spans) -> float:
    return max(stop for _, stop in spans)


def _on_streams(schedule: Schedule, times_us: list[int]) -> Spans:
    """On a GPU without interference: an operation starts when the one before it and all it waits for are over."""
    spans: Spans = []
    free: dict[Stream, float] = {}
    for op, time_us in zip(schedule.ops, times_us, strict=True):
        start = max([free.get(op.stream, 0.0), *(spans[wait][1] for wait in op.waits)])
        free[op.stream] = start + time_us
        spans.append((start, start + time_us))
    return spans


def _on_one_thread(schedule: Schedule, times_us: list[int]) -> Spans:
    """On a CPU without interference, messages one by one: it waits, computes, copies, or hands one over."""
    spans: Spans = []
    now = link_free = 0.0
    for op, time_us in zip(schedule.ops, times_us, strict=True):
        now = max([now, *(spans[wait][1] for wait in op.waits)])
        start = max(now, link_free) if op.stream == "comm" else now
        spans.append((start, start + time_us))
        if op.stream == "comm":
            link_free = start + time_us
        else:
            now = start + time_us
    return spans


@given(_schedules())
def test_without_interference_it_is_the_recursion_of_streams(case: tuple[Schedule, list[int]]) -> None:
    assert run_schedule(*case, machine()) == _on_streams(*case)


@given(_schedules())
def test_without_interference_one_thread_is_the_recursion_of_one_thread(case: tuple[Schedule, list[int]]) -> None:
    assert run_schedule(*case, machine(one_thread=True)) == _on_one_thread(*case)


@given(st.integers(2, 12), TIMES, TIMES, TIMES, st.sampled_from(["none", "S4"]))
def test_a_forward_of_equal_chunks_is_the_closed_form(
    num_chunks: int, message: int, up: int, down: int, restore: Restore
) -> None:
    """Figure 7(a): one stream of messages, S and R equally long, no copies."""
    schedule = _schedule(num_chunks, restore, backward=False)
    times = {"dispatch": message, "combine": message, "up": up, "down": down}
    compute = up + down
    expected = (
        message + max(compute, message) + (num_chunks - 2) * max(compute, 2 * message) + max(compute, message) + message
    )
    assert _end(run_schedule(schedule, [times.get(op.stage, 0) for op in schedule.ops], machine())) == expected


@given(_schedules(), _machines())
def test_no_stream_does_more_than_it_can(case: tuple[Schedule, list[int]], device: Device) -> None:
    schedule, times_us = case
    spans = run_schedule(schedule, times_us, device)
    for stream in STREAMS:
        own = [time_us for op, time_us in zip(schedule.ops, times_us, strict=True) if op.stream == stream]
        assert _end(spans) >= sum(own)
    assert all(stop - start >= time_us for (start, stop), time_us in zip(spans, times_us, strict=True))


@given(_schedules(), _machines())
def test_every_wait_is_respected_and_streams_keep_their_order(case: tuple[Schedule, list[int]], device: Device) -> None:
    schedule, times_us = case
    spans = run_schedule(schedule, times_us, device)
    for op, (start, _) in zip(schedule.ops, spans, strict=True):
        assert all(spans[wait][1] <= start for wait in op.waits), op
    for stream in STREAMS:
        own = [span for op, span in zip(schedule.ops, spans, strict=True) if op.stream == stream]
        assert all(one[0] <= other[0] for one, other in pairwise(own))
        room = device.messages_at_once if stream == "comm" else 1
        assert all(sum(start <= now < stop for start, stop in own) <= room for now, _ in own)


@given(_schedules(), _machines(at_once=1))
def test_interference_only_makes_it_longer(case: tuple[Schedule, list[int]], device: Device) -> None:
    """The critical path, by the recursion, is a lower bound."""
    recursion = _on_one_thread if device.one_thread else _on_streams
    assert _end(run_schedule(*case, device)) >= _end(recursion(*case))


@given(_schedules(), st.booleans(), st.integers(1, 2))
def test_it_is_never_longer_than_the_sum(case: tuple[Schedule, list[int]], one_thread: bool, at_once: int) -> None:
    device = machine(one_thread=one_thread, messages_at_once=at_once)
    assert _end(run_schedule(*case, device)) <= sum(case[1])


@given(_schedules(overlap=False), _machines())
def test_without_overlap_it_is_the_sum(case: tuple[Schedule, list[int]], device: Device) -> None:
    spans = run_schedule(*case, device)
    assert _end(spans) == sum(case[1])
    assert all(one[1] == other[0] for one, other in pairwise(spans))


@given(_schedules(), _machines(one_thread=True))
def test_one_thread_does_one_thing_at_a_time_and_waits_hold_up_all_that_follows(
    case: tuple[Schedule, list[int]], device: Device
) -> None:
    schedule, times_us = case
    spans = run_schedule(schedule, times_us, device)
    held_until = 0.0
    for op, (start, stop) in zip(schedule.ops, spans, strict=True):
        held_until = max([held_until, *(spans[wait][1] for wait in op.waits)])
        assert start >= held_until, op
        if op.stream != "comm":
            held_until = stop


@given(_schedules(), _machines())
def test_it_says_the_same_twice(case: tuple[Schedule, list[int]], device: Device) -> None:
    assert run_schedule(*case, device) == run_schedule(*case, device)


def test_a_gpu_copies_beside_compute_and_one_thread_does_not() -> None:
    """up1 10, its offload 30, down1 20: in 40 on streams, in 60 on one thread."""
    schedule = Schedule((Op("up", 0), Op("offload_hidden", 0, (0,)), Op("down", 0)))
    assert run_schedule(schedule, [10, 30, 20], machine()) == [(0, 10), (10, 40), (10, 30)]
    assert run_schedule(schedule, [10, 30, 20], machine(one_thread=True)) == [(0, 10), (10, 40), (40, 60)]


def test_a_wait_on_one_thread_holds_up_a_message_that_could_go() -> None:
    """The thread sits in up1's wait for dispatch1; dispatch2 is issued only after it."""
    schedule = Schedule((Op("dispatch", 0), Op("up", 0, (0,)), Op("dispatch", 1)))
    device = machine(messages_at_once=2)
    assert run_schedule(schedule, [10, 5, 7], machine(one_thread=True, messages_at_once=2)) == [
        (0, 10), (10, 15), (15, 22),
    ]  # fmt: skip
    assert run_schedule(schedule, [10, 5, 7], device)[2] == (0, 14)  # both share the link: 7 done of each


def test_two_messages_at_once_share_the_link() -> None:
    """10 and 30 from time 0: each at half speed up to 20, then 20 left alone; one by one, 10 and then 30."""
    schedule = Schedule((Op("dispatch", 0), Op("dispatch", 1)))
    assert run_schedule(schedule, [10, 30], machine(messages_at_once=2)) == [(0, 20), (0, 40)]
    assert run_schedule(schedule, [10, 30], machine()) == [(0, 10), (10, 40)]


def test_two_messages_may_fill_what_one_leaves_idle() -> None:
    """9 and 30 from time 0: each at three quarters up to 12, then 21 left alone; never faster than one alone."""
    schedule = Schedule((Op("dispatch", 0), Op("dispatch", 1)))
    (_, first), (_, second) = run_schedule(schedule, [9, 30], machine(messages_at_once=2, together_gain=1.5))
    assert (first, second) == (12, 33)
    assert run_schedule(schedule, [9, 30], machine(messages_at_once=2, together_gain=2.5)) == [(0, 9), (0, 30)]


def test_interference_by_hand() -> None:
    """A message of 10 at half speed beside compute of 12 at three quarters: at 16 compute is over, the message has 2
    left and ends at 18."""
    schedule = Schedule((Op("up", 0), Op("dispatch", 1)))
    device = machine(interference=interference(alphas(comm_compute=0.5, compute_comm=0.75)))
    assert run_schedule(schedule, [12, 10], device) == [(0, 16), (0, 18)]


def test_interference_of_three_streams_by_hand() -> None:
    """All at once, compute runs at 1/2, messages at 1/4, copies at 1. The copy (8) ends at 8, when compute has 4 left
    of 8 and the message 8 of 10. Then compute at 1, the message at 1/2: compute ends at 12, the message has 6 left."""
    schedule = Schedule((Op("up", 0), Op("dispatch", 1), Op("fetch_hidden", 1)))
    device = machine(interference=interference(alphas(compute_all=0.5, comm_all=0.25, comm_compute=0.5)))
    assert run_schedule(schedule, [8, 10, 8], device) == [(0, 12), (0, 18), (0, 8)]


def _shape(num_ranks: int = 2) -> LayerShape:
    return LayerShape(
        tokens=96,
        top_k=2,
        d_model=4,
        hidden=HiddenShape(d_hidden=8, gated=False, in_place=True),
        num_experts=2 * num_ranks,
        num_ranks=num_ranks,
    )


@pytest.mark.parametrize("one_thread", [False, True])
def test_a_step_is_what_is_outside_then_forward_then_backward(one_thread: bool) -> None:
    device = machine(outside=UNIT, rows=UNIT, one_thread=one_thread)
    for restore, num_chunks, num_ranks in product(RESTORES, (1, 3), (1, 2)):
        shape = _shape(num_ranks)
        config = PipelineConfig(num_chunks=num_chunks, restore=restore)
        plan = plan_call("encoder", config, balanced_partition(shape, config))
        work = CallWork(plan, shape)
        now_us, expected = 192.0, []  # a microsecond per row outside
        for backward, schedule in ((False, plan.forward), (True, plan.backward)):
            times_us = [work.of(op).time_us(device, num_ranks) for op in schedule.ops]
            spans = run_schedule(schedule, times_us, device)
            expected += [
                (backward, op, now_us + start, now_us + stop)
                for op, (start, stop) in zip(schedule.ops, spans, strict=True)
            ]
            now_us += _end(spans)
        found = simulate(plan, shape, device).spans
        assert [(span.backward, span.op, span.start_us, span.stop_us) for span in found] == expected
        assert {span.layer for span in found} == {"encoder"}
        assert step_us(plan, shape, device) == now_us


@pytest.mark.parametrize("num_chunks", [1, 4])
def test_issuing_costs_the_thread_that_computes_and_no_stream(num_chunks: int) -> None:
    """Without overlap a step grows by one issue per operation, messages included; a GPU's streams are filled ahead."""
    hidden = HiddenShape(d_hidden=8, gated=False, in_place=True)
    shape = LayerShape(tokens=16, top_k=1, d_model=4, hidden=hidden, num_experts=4, num_ranks=2)
    config = PipelineConfig(num_chunks=num_chunks, overlap=False)
    plan = plan_call("moe", config, balanced_partition(shape, config))
    for one_thread in (True, False):
        free, costly = (machine(one_thread=one_thread, issue_us=issue_us) for issue_us in (0.0, 256.0))
        more = step_us(plan, shape, costly) - step_us(plan, shape, free)
        assert more == 256.0 * one_thread * (len(plan.forward.ops) + len(plan.backward.ops))


def test_sending_costs_the_thread_that_computes_once_a_message() -> None:
    hidden = HiddenShape(d_hidden=8, gated=False, in_place=True)
    shape = LayerShape(tokens=16, top_k=1, d_model=4, hidden=hidden, num_experts=4, num_ranks=2)
    config = PipelineConfig(num_chunks=2, overlap=False)
    plan = plan_call("moe", config, balanced_partition(shape, config))
    messages = [op for op in (*plan.forward.ops, *plan.backward.ops) if op.stream == "comm"]
    for one_thread in (True, False):
        free, costly = (machine(one_thread=one_thread, send_us=send_us) for send_us in (0.0, 256.0))
        assert step_us(plan, shape, costly) - step_us(plan, shape, free) == 256.0 * one_thread * len(messages)


def test_a_rank_that_only_receives_is_as_busy_as_the_one_that_sends() -> None:
    """Rank 0 sends rank 1 ten rows of 16 bytes; rank 1 keeps thirty of its own, which do not travel."""
    config, device = PipelineConfig(num_chunks=2), machine(product=NOTHING)
    sender = partition(((0,), (10,)), ((0,), (0,)), num_chunks=2, rank=0)
    receiver = partition(((0,), (30,)), ((10,), (30,)), num_chunks=2, rank=1)
    for rank, cut in enumerate((sender, receiver)):
        plan = plan_call("moe", config, cut)
        assert step_us(plan, _shape(), device, rank=rank) == 4 * 10 * 16


@pytest.mark.parametrize(
    ("computed_us", "end_us"),
    [(2, 7), (10, 14), (0, 7)],
    ids=["some of the burst is back", "all of it", "nothing of it"],
)
def test_a_link_that_has_rested_sends_its_burst_at_once(computed_us: int, end_us: int) -> None:
    schedule = Schedule((Op("dispatch", 0), Op("up", 0, (0,)), Op("combine", 0, (1,))))
    device = machine(burst_us=3.0, one_thread=False)
    spans = run_schedule(schedule, [5, computed_us, 5], device)
    assert spans[0] == (0, 2)
    assert spans[2] == (2 + computed_us, end_us)
    assert (
        run_schedule(schedule, [5, computed_us, 5], machine(burst_us=0.0, one_thread=False))[2][1] == 10 + computed_us
    )
