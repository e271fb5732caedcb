"""Figure 3: how much compute, messages and copies slow each other, measured here beside the paper's table."""

from configs.schema import Config
from moe_pipeline.plan.device import Device, load_device
from moe_pipeline.plan.schedule import Stream
from scripts.testbed import launch, link
from scripts.testbed.benchmarks.own_layer import sizes_of
from scripts.testbed.calibration import calibrate
from scripts.testbed.report import Section, Table
from scripts.testbed.rows import Row

NUM_RANKS = 2
PAPER_DEVICE = "a100_hdr"  # its file holds the paper's table as printed
STREAMS: tuple[Stream, ...] = ("comm", "compute", "copy")
HERE: tuple[tuple[Stream, Stream], ...] = (  # one thread computes and copies
    ("compute", "comm"),
    ("comm", "compute"),
    ("copy", "comm"),
    ("comm", "copy"),
)


def bench(config: Config, run: launch.Run) -> launch.Outcome:
    """Measure the four factors there are on a CPU and show them beside the paper's twelve.

    Args:
        config: The run's configuration; the first of `bench.links_mbit` is the link.
        run: Where to write.

    Raises:
        ConfigError: Where this machine cannot shape links.
    """
    bench, rate_mbit = config.bench, config.bench.links_mbit[0]
    with link.joined(NUM_RANKS, rate_mbit, loopback="bench.links_mbit=[0]") as hosts:
        here = calibrate(
            sizes_of(bench),
            hosts=hosts,
            num_ranks=NUM_RANKS,
            folder=run.folder / "ranks",
            repeats=bench.repeats,
            name="here",
        )
    paper = load_device(PAPER_DEVICE)
    summary: dict[str, float | int | str | None] = {
        f"alpha_{stream}_beside_{other}": _alpha(here, stream, other) for stream, other in HERE
    }
    rows = [
        Row(
            provider=provider,
            metric=f"alpha_{stream}_beside_{other}",
            unit="ratio",
            value=_alpha(device, stream, other),
        )
        for provider, device in (("moe_pipeline", here), ("paper", paper))
        for stream, other in HERE
    ]
    return launch.Outcome(rows=tuple(rows), summary=summary, sections=(_section(here, paper, link.label(rate_mbit)),))


def _alpha(device: Device, stream: Stream, other: Stream) -> float:
    return device.interference.alpha(stream, frozenset({other}))


def _section(here: Device, paper: Device, link_name: str) -> Section:
    def cell(stream: Stream, other: Stream) -> str:
        if stream == other:
            return "1"
        ours = f"{_alpha(here, stream, other):.2f}" if (stream, other) in HERE else "never at once"
        return f"{_alpha(paper, stream, other):.2f} / {ours}"

    rows = tuple(
        (
            stream,
            *(cell(stream, other) for other in STREAMS),
            f"{paper.interference.alpha(stream, frozenset(STREAMS)):.2f} / -",
        )
        for stream in STREAMS
    )
    return Section(
        title="Figure 3: speed of the row's stream while the column's runs",
        note=f"Paper (64 A100, printed) / measured here (two ranks of one core each, {link_name}). On a CPU one thread "
        "computes and copies, so these two never run at once; a message costs its sender and receiver a share of the "
        "core that computes, which is the interference there is.",
        table=Table(headers=("", *STREAMS, "all"), rows=rows),
    )
