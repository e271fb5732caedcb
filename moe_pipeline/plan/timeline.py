"""Timeline: what ran when on which stream, measured or simulated, how much of the messages was hidden, and a trace."""

import json
from collections.abc import Iterable
from dataclasses import dataclass

from moe_pipeline.plan.schedule import Op, Stream


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
