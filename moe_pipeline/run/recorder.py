"""Recorder: notes what runs when on which stream; off unless asked for, and then two clock readings per operation."""

import threading
import time
from collections.abc import Callable

import torch

from moe_pipeline.plan.schedule import Op
from moe_pipeline.plan.timeline import Span, Timeline
from moe_pipeline.run.comm import Message

CALLBACK_TIMEOUT_S = 30.0


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
