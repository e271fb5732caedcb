"""Timeline: what ran when on which stream, how much of the messages was hidden, and a trace to look at.

Recording is off unless asked for, and then notes two clock readings per operation.
"""

import json
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from moe_pipeline.plan.schedule import Op, Stream
from moe_pipeline.run.comm import Message

CALLBACK_TIMEOUT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Span:
    """One operation that ran.

    Source: MPipeMoE (arXiv:2506.22175) figure 7.
    """

    layer: str
    backward: bool
    op: Op
    start_us: float
    """Microseconds since recording began: when it was issued (a message) or started."""
    stop_us: float
    """When it was over."""

    @property
    def stream(self) -> Stream:
        """Its stream; not in the paper."""
        return self.op.stream


@dataclass(frozen=True)
class Timeline:
    """The operations of everything that was recorded, by the time they began.

    Source: MPipeMoE (arXiv:2506.22175) figure 7; the measures are the journal's section 5.6.
    """

    spans: tuple[Span, ...]

    @property
    def step_us(self) -> float:
        """From the first operation's begin to the last one's end; not in the paper."""
        if not self.spans:
            return 0.0
        return max(span.stop_us for span in self.spans) - min(span.start_us for span in self.spans)

    def busy_us(self, stream: Stream) -> float:
        """Time in which at least one operation of a stream was under way.

        Args:
            stream: The stream.

        Source: not in the paper.
        """
        return sum(stop - start for start, stop in self._busy(stream))

    @property
    def exposed_us(self) -> float:
        """Time in which messages were under way and nothing was computed or copied.

        Source: our definition.
        """
        working = _union([*self._busy("compute"), *self._busy("copy")])
        return self.busy_us("comm") - _overlap(self._busy("comm"), working)

    @property
    def overlap_efficiency(self) -> float:
        """The longer of messages and compute against the step: 1 where the shorter one is hidden whole.

        Source: MPMoE (IEEE TPDS 2024) section 5.6.
        """
        return max(self.busy_us("comm"), self.busy_us("compute")) / self.step_us if self.step_us else 0.0

    def perfetto(self) -> str:
        """A trace in the JSON format that Perfetto and chrome://tracing open; not in the paper."""
        streams = ("compute", "comm", "copy")
        events: list[dict[str, object]] = [
            {"ph": "M", "pid": 0, "tid": tid, "name": "thread_name", "args": {"name": name}}
            for tid, name in enumerate(streams)
        ]
        events += [
            {
                "ph": "X",
                "pid": 0,
                "tid": streams.index(span.stream),
                "name": str(span.op),
                "ts": span.start_us,
                "dur": span.stop_us - span.start_us,
                "args": {"layer": span.layer, "direction": "backward" if span.backward else "forward"},
            }
            for span in self.spans
        ]
        return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})

    def _busy(self, stream: Stream) -> list[tuple[float, float]]:
        return _union((span.start_us, span.stop_us) for span in self.spans if span.stream == stream)


class Recorder:
    """Notes when operations run; one for any number of layers and steps.

    Source: not in the paper.
    """

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._events: list[tuple[str, bool, Op, torch.cuda.Event, torch.cuda.Event]] = []
        self._layer, self._backward = "", False
        self._start_ns = time.perf_counter_ns()
        self._first_event: torch.cuda.Event | None = None
        self._under_way = 0
        self._over = threading.Condition()

    def enter(self, layer: str, *, backward: bool) -> None:
        """Say which pass the next operations belong to.

        Args:
            layer: The layer's name.
            backward: Which of its passes.

        Source: not in the paper.
        """
        self._layer, self._backward = layer, backward

    def run(self, op: Op, handler: Callable[[int], Message | None]) -> Message | None:
        """Run an operation on this thread; a message is noted as over by its own thread.

        Args:
            op: The operation.
            handler: What does it.

        Returns:
            What the handler returned.

        Source: not in the paper.
        """
        layer, backward, start_us = self._layer, self._backward, self._now_us()
        message = handler(op.chunk)
        if message is None:
            self._note(layer, backward, op, start_us)
            return None
        with self._over:
            self._under_way += 1

        def done(_: object) -> None:
            with self._over:
                self._note(layer, backward, op, start_us)
                self._under_way -= 1
                self._over.notify_all()

        message.on_done(done)
        return message

    def run_on_stream(self, op: Op, handler: Callable[[int], Message | None], stream: torch.cuda.Stream) -> None:
        """Run an operation between two events of a CUDA stream.

        Args:
            op: The operation.
            handler: What issues it.
            stream: The current stream.

        Source: not in the paper.
        """
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(stream)
        self._first_event = self._first_event or start
        handler(op.chunk)
        stop.record(stream)
        self._events.append((self._layer, self._backward, op, start, stop))

    def timeline(self) -> Timeline:
        """What was recorded so far, once all messages are over.

        Returns:
            The timeline.

        Raises:
            TimeoutError: If a message is not over within half a minute.

        Source: not in the paper.
        """
        with self._over:
            if not self._over.wait_for(lambda: self._under_way == 0, timeout=CALLBACK_TIMEOUT_S):
                raise TimeoutError(
                    f"timeline: {self._under_way} messages are not over after {CALLBACK_TIMEOUT_S:g} s; call it after "
                    "the step whose messages it shows"
                )
            spans = [*self._spans, *self._cuda_spans()]
        return Timeline(tuple(sorted(spans, key=lambda span: (span.start_us, span.stop_us))))

    def _cuda_spans(self) -> list[Span]:
        first = self._first_event
        if first is None:
            return []
        torch.cuda.synchronize()
        return [
            Span(
                layer=layer,
                backward=backward,
                op=op,
                start_us=1e3 * first.elapsed_time(start),
                stop_us=1e3 * first.elapsed_time(stop),
            )
            for layer, backward, op, start, stop in self._events
        ]

    def _note(self, layer: str, backward: bool, op: Op, start_us: float) -> None:
        self._spans.append(Span(layer=layer, backward=backward, op=op, start_us=start_us, stop_us=self._now_us()))

    def _now_us(self) -> float:
        return (time.perf_counter_ns() - self._start_ns) / 1e3


def _union(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for start, stop in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def _overlap(left: list[tuple[float, float]], right: list[tuple[float, float]]) -> float:
    return sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in left for b in right)
