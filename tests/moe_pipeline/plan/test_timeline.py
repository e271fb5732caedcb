"""Measures of hand-made spans, and the trace's format."""

import json

from hypothesis import given
from hypothesis import strategies as st

from moe_pipeline.plan.schedule import Op, Stage
from moe_pipeline.plan.timeline import Span, Timeline

OF_STREAM: dict[str, Stage] = {"compute": "up", "comm": "dispatch", "copy": "offload_hidden"}


def _span(stream: str, start: float, stop: float, *, chunk: int = 0, backward: bool = False) -> Span:
    return Span(layer="moe", backward=backward, op=Op(OF_STREAM[stream], chunk), start_us=start, stop_us=stop)


def test_measures_of_a_step_by_hand() -> None:
    """Messages 0-10 and 12-20, compute 4-14, a copy 13-16: hidden are 4-10 and 12-16."""
    timeline = Timeline((_span("comm", 0, 10), _span("compute", 4, 14), _span("comm", 12, 20), _span("copy", 13, 16)))
    assert timeline.step_us == 20
    assert timeline.busy_us("comm") == 18
    assert timeline.busy_us("compute") == 10
    assert timeline.busy_us("copy") == 3
    assert timeline.exposed_us == 4 + 4
    assert timeline.overlap_efficiency == 18 / 20


def test_time_under_two_messages_counts_once() -> None:
    timeline = Timeline((_span("comm", 0, 10), _span("comm", 5, 12), _span("comm", 5, 6), _span("compute", 6, 8)))
    assert timeline.busy_us("comm") == 12
    assert timeline.exposed_us == 10
    assert timeline.overlap_efficiency == 1


def test_nothing_recorded_takes_no_time() -> None:
    timeline = Timeline(())
    assert (timeline.step_us, timeline.busy_us("comm"), timeline.exposed_us, timeline.overlap_efficiency) == (
        0,
        0,
        0,
        0,
    )
    assert json.loads(timeline.perfetto())["traceEvents"]


SPANS = st.lists(
    st.builds(
        lambda stream, start, length: _span(stream, start, start + length),
        st.sampled_from(sorted(OF_STREAM)), st.integers(0, 30), st.integers(0, 10),
    ),
    max_size=8,
)  # fmt: skip


@given(SPANS)
def test_measures_equal_a_count_of_ticks(spans: list[Span]) -> None:
    timeline = Timeline(tuple(spans))

    def ticks(*streams: str) -> set[int]:
        chosen = [span for span in spans if span.stream in streams]
        return {tick for span in chosen for tick in range(int(span.start_us), int(span.stop_us))}

    for stream in OF_STREAM:
        assert timeline.busy_us(stream) == len(ticks(stream))  # type: ignore[arg-type]
    assert timeline.exposed_us == len(ticks("comm") - ticks("compute", "copy"))
    if timeline.step_us:
        longer = max(len(ticks("comm")), len(ticks("compute")))
        assert timeline.overlap_efficiency == longer / timeline.step_us


def test_a_step_of_no_length_has_measures_too() -> None:
    """A clock may stand still over a tiny operation."""
    timeline = Timeline((_span("compute", 3, 3), _span("comm", 3, 3)))
    assert (timeline.step_us, timeline.busy_us("comm"), timeline.exposed_us) == (0, 0, 0)
    assert timeline.overlap_efficiency == 0


def test_the_trace_has_the_fields_that_viewers_read() -> None:
    timeline = Timeline((_span("comm", 0.5, 10, chunk=2), _span("compute", 4, 14.25, backward=True)))
    trace = json.loads(timeline.perfetto())
    names = {event["tid"]: event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"}
    assert names == {0: "compute", 1: "comm", 2: "copy"}
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert [(event["name"], names[event["tid"]], event["ts"], event["dur"]) for event in spans] == [
        ("dispatch3", "comm", 0.5, 9.5),
        ("up1", "compute", 4, 10.25),
    ]
    assert [event["args"] for event in spans] == [
        {"layer": "moe", "direction": "forward"},
        {"layer": "moe", "direction": "backward"},
    ]
    assert {event["pid"] for event in trace["traceEvents"]} == {0}
