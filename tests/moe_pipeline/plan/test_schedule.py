"""Schedules as printed text, and what holds for all of them: waits point back, and no buffer is written too early.

The table of who touches which ring is this test's own; it follows the paper's event rules (section III-D) and knows
nothing of how the schedule was built.
"""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import pytest

from moe_pipeline.config import Restore
from moe_pipeline.plan.schedule import Op, Schedule, backward_schedule, forward_schedule
from moe_pipeline.plan.strategy import RingDepths, Strategy, ring_depths, strategy

RESTORES: tuple[Restore, ...] = ("none", "S1", "S2", "S3", "S4")
CHUNKS = range(1, 9)


class Case(NamedTuple):
    num_chunks: int
    restore: Restore
    exchanges: bool
    overlap: bool
    backward: bool
    input_for_dgrad: bool

    @property
    def strategy(self) -> Strategy:
        return strategy(self.restore)

    def schedule(self) -> Schedule:
        depths = ring_depths(self.strategy, self.num_chunks)
        settings = {"exchanges": self.exchanges, "overlap": self.overlap}
        if not self.backward:
            return forward_schedule(self.num_chunks, self.strategy, depths, **settings)
        return backward_schedule(
            self.num_chunks, self.strategy, depths, input_for_dgrad=self.input_for_dgrad, **settings
        )


CASES = [
    Case(*case)
    for case in product(CHUNKS, RESTORES, (False, True), (False, True), (False, True), (False, True))
    if case[-2] or not case[-1]  # input_for_dgrad is backward's alone
]

GOLDEN = {
    Case(4, "none", True, True, False, False): """\
compute gather1 gather2 up1 down1 gather3 up2 down2 gather4 up3 down3 up4 down4 sum4
comm    dispatch1 dispatch2 combine1 dispatch3 combine2 dispatch4 combine3 combine4""",
    Case(4, "none", True, True, True, False): """\
compute gather_grad1 gather_grad2 dgrad1 gather_grad3 wgrad1 dgrad2 gather_grad4 wgrad2 dgrad3 wgrad3 dgrad4 wgrad4 \
sum_grad4
comm    dispatch_grad1 dispatch_grad2 combine_grad1 dispatch_grad3 combine_grad2 dispatch_grad4 combine_grad3 \
combine_grad4""",
    Case(3, "S1", True, True, False, False): """\
compute gather1 gather2 up1 down1 gather3 up2 down2 up3 down3 sum3
comm    dispatch1 dispatch2 combine1 dispatch3 combine2 combine3
copy    offload_dispatched1 offload_hidden1 offload_dispatched2 offload_hidden2 offload_dispatched3 offload_hidden3""",
    Case(3, "S1", True, True, True, False): """\
compute gather_grad1 gather_grad2 dgrad1 wgrad1 gather_grad3 dgrad2 wgrad2 dgrad3 wgrad3 sum_grad3
comm    dispatch_grad1 dispatch_grad2 combine_grad1 dispatch_grad3 combine_grad2 combine_grad3
copy    fetch_dispatched1 fetch_hidden1 fetch_dispatched2 fetch_hidden2 fetch_dispatched3 fetch_hidden3""",
    Case(2, "S2", True, True, True, False): """\
compute gather_grad1 regather1 gather_grad2 regather2 dgrad1 wgrad1 dgrad2 wgrad2 sum_grad2
comm    dispatch_grad1 resend1 dispatch_grad2 resend2 combine_grad1 combine_grad2
copy    fetch_hidden1 fetch_hidden2""",
    Case(3, "S4", True, True, True, False): """\
compute gather_grad1 regather1 gather_grad2 regather2 recompute1 dgrad1 wgrad1 gather_grad3 regather3 recompute2 \
dgrad2 wgrad2 recompute3 dgrad3 wgrad3 sum_grad3
comm    dispatch_grad1 resend1 dispatch_grad2 resend2 combine_grad1 dispatch_grad3 resend3 combine_grad2 \
combine_grad3""",
    Case(2, "S3", True, False, True, False): """\
compute gather_grad1 recompute1 dgrad1 wgrad1 gather_grad2 recompute2 dgrad2 wgrad2 sum_grad2
comm    dispatch_grad1 combine_grad1 dispatch_grad2 combine_grad2
copy    fetch_dispatched1 fetch_dispatched2""",
    Case(2, "none", False, True, False, False): "compute gather1 gather2 up1 down1 up2 down2 sum2",
}


@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_printed(case: Case) -> None:
    assert str(case.schedule()) == GOLDEN[case]


def test_messages_travel_in_the_papers_order() -> None:
    """Section III-B, figure 7(a): S1 S2 R1 S3 R2 S4 R3 R4, in both directions."""
    letters = {"dispatch": "S", "combine": "R", "dispatch_grad": "S", "combine_grad": "R"}
    for backward in (False, True):
        comm = Case(4, "S1", True, True, backward, False).schedule().stream("comm")
        assert " ".join(f"{letters[op.stage]}{op.chunk + 1}" for op in comm) == "S1 S2 R1 S3 R2 S4 R3 R4"


def test_every_operation_stands_once_and_waits_point_back_to_other_streams() -> None:
    for case in CASES:
        ops = case.schedule().ops
        assert len({(op.stage, op.chunk) for op in ops}) == len(ops), case
        for position, op in enumerate(ops):
            assert list(op.waits) == sorted(set(op.waits)), case
            for wait in op.waits:
                assert 0 <= wait < position, (case, op)
                assert ops[wait].stream != op.stream, (case, op)


def test_the_stages_are_those_of_the_strategy() -> None:
    for case in CASES:
        chosen, n = case.strategy, case.num_chunks
        per_chunk = {"gather_grad", "dgrad", "wgrad"} if case.backward else {"gather", "up", "down"}
        if case.exchanges:
            per_chunk |= {"dispatch_grad", "combine_grad"} if case.backward else {"dispatch", "combine"}
        if chosen.dispatched == "offload":
            per_chunk.add("fetch_dispatched" if case.backward else "offload_dispatched")
        if chosen.hidden == "offload":
            per_chunk.add("fetch_hidden" if case.backward else "offload_hidden")
        if case.backward and chosen.dispatched == "resend":
            per_chunk |= {"regather", "resend"} if case.exchanges else {"regather"}
        if case.backward and chosen.hidden == "recompute":
            per_chunk.add("recompute")
        expected = {(stage, chunk) for stage in per_chunk for chunk in range(n)}
        expected.add(("sum_grad" if case.backward else "sum", n - 1))
        assert {(op.stage, op.chunk) for op in case.schedule().ops} == expected, case


def _before(ops: tuple[Op, ...]) -> list[set[int]]:
    """For every operation, those that are over when it starts: earlier on its stream, awaited, and so on from there."""
    before: list[set[int]] = []
    last: dict[str, int] = {}
    for position, op in enumerate(ops):
        direct = [*op.waits, *([last[op.stream]] if op.stream in last else [])]
        before.append(set(direct).union(*(before[other] for other in direct)))
        last[op.stream] = position
    return before


def test_without_overlap_every_operation_waits_for_the_one_before() -> None:
    for case in CASES:
        if not case.overlap:
            before = _before(case.schedule().ops)
            assert all(before[position] == set(range(position)) for position in range(len(before))), case


def test_with_overlap_the_next_message_does_not_wait_for_compute() -> None:
    """The reason for it all: while chunk c is computed, chunk c + 1 is on its way."""
    for case in CASES:
        if not (case.overlap and case.exchanges and case.num_chunks > 1):
            continue
        ops = case.schedule().ops
        before = _before(ops)
        positions = {(op.stage, op.chunk): position for position, op in enumerate(ops)}
        send, compute = ("dispatch_grad", "dgrad") if case.backward else ("dispatch", "up")
        for chunk in range(case.num_chunks - 1):
            assert positions[compute, chunk] not in before[positions[send, chunk + 1]], (case, chunk)


Access = tuple[str, str]  # "r" or "w", ring


def _forward_accesses(stage: str, case: Case, *, sorts: bool) -> list[Access]:
    here = "sorted" if sorts else "arrived"
    table: dict[str, list[Access]] = {
        "gather": [("w", "staging")] if case.exchanges else [("w", "arrived")],
        "dispatch": [("r", "staging"), ("w", "arrived")],
        "up": [("r", "arrived"), *([("w", "sorted")] if sorts else []), ("r", here), ("w", "hidden")],
        "offload_dispatched": [("r", here)],
        "offload_hidden": [("r", "hidden")],
        "down": [("r", "hidden"), ("w", "activated"), ("r", "activated")],
        "combine": [("r", "result")],
        "sum": [],
    }
    if case.exchanges:
        table["down"] += [("w", "unsorted"), ("r", "unsorted"), ("w", "result")]
    return table[stage]


def _backward_accesses(stage: str, case: Case, *, sorts: bool) -> list[Access]:
    grad = "sorted" if sorts else "arrived"
    resorts = sorts and case.strategy.dispatched == "resend"  # what is fetched from the host was sorted before it went
    rows = "input_sorted" if resorts else "input"
    sort_rows: list[Access] = [("r", "input"), ("w", "input_sorted")] if resorts else []
    table: dict[str, list[Access]] = {
        "gather_grad": [("w", "staging")] if case.exchanges else [("w", "arrived")],
        "dispatch_grad": [("r", "staging"), ("w", "arrived")],
        "regather": [("w", "input_staging")] if case.exchanges else [("w", "input")],
        "resend": [("r", "input_staging"), ("w", "input")],
        "fetch_dispatched": [("w", "input")],
        "fetch_hidden": [("w", "hidden")],
        "recompute": [*sort_rows, ("r", rows), ("w", "hidden")],
        "dgrad": [("r", "arrived"), *([("w", "sorted")] if sorts else []), ("r", grad), ("r", "hidden"),
                  ("w", "activated"), ("w", "grad_hidden"), ("r", "grad_hidden")],
        "combine_grad": [("r", "result")],
        "wgrad": [("r", grad), ("r", "hidden"), ("w", "activated"), ("r", "activated"), ("r", "grad_hidden")],
        "sum_grad": [],
    }  # fmt: skip
    if case.exchanges:
        table["dgrad"] += [("w", "unsorted"), ("r", "unsorted"), ("w", "result")]
    if case.strategy.name == "none":
        return [access for access in table[stage] if access != ("r", "hidden")]  # kept since forward
    first = "recompute" if case.strategy.hidden == "recompute" else "dgrad" if case.input_for_dgrad else "wgrad"
    if stage == first != "recompute":
        table[stage] = [*sort_rows, *table[stage]]
    if stage == "wgrad" or (stage == "dgrad" and case.input_for_dgrad):
        table[stage] = [*table[stage], ("r", rows)]
    return table[stage]


def _touches(case: Case, *, sorts: bool) -> Iterator[tuple[int, Op, str, str]]:
    """Position, operation, "r" or "w", ring."""
    accesses = _backward_accesses if case.backward else _forward_accesses
    for position, op in enumerate(case.schedule().ops):
        for mode, ring in accesses(op.stage, case, sorts=sorts):
            yield position, op, mode, ring


def _depth(ring: str, case: Case) -> int:
    depths = ring_depths(case.strategy, case.num_chunks)
    if not case.strategy.shares_buffers:
        return case.num_chunks  # every chunk has its own
    return {
        "staging": depths.staging, "input_staging": depths.staging, "arrived": depths.dispatched,
        "sorted": depths.dispatched, "input": depths.dispatched, "input_sorted": depths.dispatched,
        "hidden": depths.hidden, "result": depths.result, "unsorted": 1, "activated": 1, "grad_hidden": 1,
    }[ring]  # fmt: skip


def _races(case: Case, schedule: Schedule, *, sorts: bool) -> list[str]:
    """Reads of what may not have been written, and writes over what may still be read or written."""
    before = _before(schedule.ops)
    touches = list(_touches(case, sorts=sorts))
    races = []
    for position, op, mode, ring in touches:
        if mode == "r":
            writers = [other for other, by, how, of in touches if (how, of, by.chunk) == ("w", ring, op.chunk)]
            if not any(writer in before[position] or writer == position for writer in writers):
                races.append(f"{op} reads {ring}, which nobody has written")
            continue
        for other, by, how, of in touches:
            taken = (
                of == ring and by.chunk < op.chunk and by.chunk % _depth(ring, case) == op.chunk % _depth(ring, case)
            )
            if taken and other not in before[position]:
                races.append(f"{op} writes {ring} while {by} may still {'read' if how == 'r' else 'write'} it")
    return races


@pytest.mark.parametrize("restore", RESTORES)
def test_no_buffer_is_written_while_it_may_still_be_read(restore: Restore) -> None:
    for case in CASES:
        if case.restore == restore:
            for sorts in (False, True) if case.exchanges else (False,):
                assert _races(case, case.schedule(), sorts=sorts) == [], (case, sorts)


@pytest.mark.parametrize("backward", [False, True])
def test_the_check_above_finds_a_missing_wait(backward: bool) -> None:
    """Without its waits, or with those of deeper rings, a schedule has races; so the check can fail."""
    case = Case(5, "S1", True, True, backward, False)
    bare = Schedule(tuple(Op(op.stage, op.chunk) for op in case.schedule().ops))
    assert _races(case, bare, sorts=True)
    deeper = RingDepths(staging=3, dispatched=3, hidden=3, result=3)
    build = backward_schedule if backward else forward_schedule
    assert _races(case, build(5, case.strategy, deeper, exchanges=True), sorts=True)


def test_the_end_comes_after_every_message_and_copy() -> None:
    for case in CASES:
        ops = case.schedule().ops
        assert _before(ops)[-1] == set(range(len(ops) - 1)), case
