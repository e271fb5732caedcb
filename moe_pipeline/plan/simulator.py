"""Simulator: the runtime's own schedules, executed on paper with a device's speeds.

Every operation runs as fast as its stream does beside whatever runs at the same time. On a GPU each stream takes its
next operation when the one before it and all that it waits for are over; on a CPU one thread computes, copies, issues
and waits, and only messages run beside it: the same two ways in which `run/executor.py` carries a schedule out.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from moe_pipeline.plan.call import CallPlan
from moe_pipeline.plan.device import Device
from moe_pipeline.plan.ledger import LayerShape
from moe_pipeline.plan.schedule import Schedule, Stream
from moe_pipeline.plan.timeline import Span, Timeline
from moe_pipeline.plan.work import CallWork

INSTANT_US = 1e-9  # what is left of an operation that rounding left unfinished


@dataclass
class _Running:
    position: int
    start_us: float
    left_us: float


def simulate(plan: CallPlan, shape: LayerShape, device: Device, *, rank: int = 0) -> Timeline:
    """Forward and backward of one call, and what a step does outside them.

    Args:
        plan: The call, with the rows of every chunk.
        shape: The layer.
        device: Speeds and interference.
        rank: Whose rows the plan holds.

    Returns:
        The timeline; its end is the length of the step.

    Source: MPipeMoE (arXiv:2506.22175) sections III-D and III-E; the simulation is not in the paper.
    """
    work = CallWork(plan, shape, rank=rank)
    now_us = device.outside.time_us(shape.tokens * shape.top_k)
    spans: list[Span] = []
    for backward, schedule in ((False, plan.forward), (True, plan.backward)):
        times_us = _alone_us(schedule, work, shape, device)
        for op, (start_us, stop_us) in zip(schedule.ops, run_schedule(schedule, times_us, device), strict=True):
            spans.append(
                Span(layer=plan.layer, backward=backward, op=op, start_us=now_us + start_us, stop_us=now_us + stop_us)
            )
        now_us = max((span.stop_us for span in spans), default=now_us)
    return Timeline(tuple(spans))


def _alone_us(schedule: Schedule, work: CallWork, shape: LayerShape, device: Device) -> list[float]:
    """Every operation's time when nothing runs beside it.

    Where one thread issues all, what that costs for a message holds up the next operation that the thread computes.
    """
    times_us, issuing_us = [], 0.0
    for op in schedule.ops:
        time_us = work.of(op).time_us(device, shape.num_ranks)
        if device.one_thread:
            issuing_us += device.issue_us + (device.send_us if op.stream == "comm" else 0.0)
        if op.stream != "comm":
            time_us, issuing_us = time_us + issuing_us, 0.0
        times_us.append(time_us)
    return times_us


def step_us(plan: CallPlan, shape: LayerShape, device: Device, *, rank: int = 0) -> float:
    """Length of a simulated step.

    Args:
        plan: As for `simulate`.
        shape: As for `simulate`.
        device: As for `simulate`.
        rank: As for `simulate`.

    Source: as `simulate`.
    """
    return max(span.stop_us for span in simulate(plan, shape, device, rank=rank).spans)


def run_schedule(schedule: Schedule, times_us: Sequence[float], device: Device) -> list[tuple[float, float]]:
    """Begin and end of every operation of a schedule.

    Args:
        schedule: The operations.
        times_us: How long each takes when nothing runs beside it.
        device: Interference, and how operations are issued.

    Returns:
        (begin, end) for every operation, in microseconds.

    Source: as `simulate`.
    """
    return _Execution(schedule, times_us, device).run()


class _Execution:
    def __init__(self, schedule: Schedule, times_us: Sequence[float], device: Device) -> None:
        self._ops, self._times_us, self._device = schedule.ops, times_us, device
        self._spans: dict[int, tuple[float, float]] = {}
        self._running: list[_Running] = []
        self._to_issue = deque(range(len(schedule.ops)))
        self._issued: dict[Stream, deque[int]] = {"compute": deque(), "comm": deque(), "copy": deque()}
        self._burst_us, self._last_sent_us = device.burst_us, 0.0

    def run(self) -> list[tuple[float, float]]:
        now_us = 0.0
        while len(self._spans) < len(self._ops):
            self._issue()
            self._start(now_us)
            speeds = self._speeds()
            passed_us = min(one.left_us / speed for one, speed in zip(self._running, speeds, strict=True))
            now_us += passed_us
            for one, speed in zip(self._running, speeds, strict=True):
                one.left_us -= passed_us * speed
            for one in [one for one in self._running if one.left_us <= INSTANT_US]:
                self._spans[one.position] = (one.start_us, now_us)
                self._running.remove(one)
                if self._ops[one.position].stream == "comm":
                    self._last_sent_us = now_us
        return [self._spans[position] for position in range(len(self._ops))]

    def _issue(self) -> None:
        """Put operations into their streams' queues: all at once, or one by one as the one thread gets to them."""
        while self._to_issue and not (self._device.one_thread and self._thread_is_busy()):
            position = self._to_issue.popleft()
            self._issued[self._ops[position].stream].append(position)

    def _thread_is_busy(self) -> bool:
        """Whether something is computed or copied, or waited for before it can be."""
        under_way = [self._ops[one.position].stream for one in self._running]
        return bool(self._issued["compute"] or self._issued["copy"] or {"compute", "copy"} & set(under_way))

    def _start(self, now_us: float) -> None:
        """Start the first operations of every stream's queue that is free."""
        for stream, queue in self._issued.items():
            room = self._device.messages_at_once if stream == "comm" else 1
            room -= sum(self._ops[one.position].stream == stream for one in self._running)
            while queue and room > 0 and self._is_ready(queue[0]):
                position = queue.popleft()
                left_us = self._times_us[position]
                if stream == "comm":
                    left_us -= self._sent_at_once_us(left_us, now_us)
                self._running.append(_Running(position, now_us, left_us))
                room -= 1

    def _sent_at_once_us(self, time_us: float, now_us: float) -> float:
        """What a message is spared of its time: the burst comes back while nothing is under way."""
        if not any(self._ops[one.position].stream == "comm" for one in self._running):
            self._burst_us = min(self._device.burst_us, self._burst_us + now_us - self._last_sent_us)
        spared_us = min(self._burst_us, max(0.0, time_us - self._device.node_message.latency_us))
        self._burst_us -= spared_us
        return spared_us

    def _is_ready(self, position: int) -> bool:
        return all(wait in self._spans for wait in self._ops[position].waits)

    def _speeds(self) -> list[float]:
        streams = [self._ops[one.position].stream for one in self._running]
        active, messages = frozenset(streams), streams.count("comm")
        share = min(1.0, self._device.together_gain / messages) if messages > 1 else 1.0
        return [
            self._device.interference.alpha(stream, active) * (share if stream == "comm" else 1.0) for stream in streams
        ]
