"""A machine whose figures are easy to reckon with: every volume takes as many microseconds as it has units."""

from dataclasses import replace

from moe_pipeline.plan.device import Device, Speed, interference

STREAMS = ("compute", "comm", "copy")
UNIT = Speed(0.0, ((1.0, 1e6),))  # a unit of volume per microsecond
NOTHING = Speed(0.0, ((1.0, 1e300),))  # takes no time that a float beside 1 could show


def alphas(**changes: float) -> dict[str, dict[str, float]]:
    """A table of factors that are 1 but for those given as stream_beside=factor."""
    table = {y: {**{x: 1.0 for x in STREAMS if x != y}, "all": 1.0} for y in STREAMS}
    for pair, factor in changes.items():
        stream, beside = pair.split("_")
        table[stream][beside] = factor
    return table


def machine(**changes: object) -> Device:
    """The machine, with some fields set otherwise."""
    plain = Device(
        name="unit",
        origin="made up for tests",
        product=UNIT,
        message=UNIT,
        node_message=UNIT,
        ranks_per_node=8,
        peer_us=0.0,
        copy=UNIT,
        rows=NOTHING,
        outside=NOTHING,
        interference=interference(alphas()),
        one_thread=False,
        issue_us=0.0,
        send_us=0.0,
        burst_us=0.0,
        messages_at_once=1,
        together_gain=1.0,
        memory_bytes=2**34,
        host_bytes=2**36,
        pinned=True,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]
