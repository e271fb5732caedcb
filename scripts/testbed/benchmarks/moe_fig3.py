"""Figure 3: how much compute, messages and copies slow each other, measured here beside the paper's table."""

from contextlib import ExitStack

from configs.schema import Config
from configs.typed import ConfigError
from moe_pipeline.plan.device import Device, load_device
from moe_pipeline.plan.schedule import Stream
from scripts.testbed import launch
from scripts.testbed.calibration import calibrate
from scripts.testbed.network import NetworkError, shaped_hosts
from scripts.testbed.peers import MoESizes
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
    sizes = MoESizes(
        num_experts=bench.num_experts,
        top_k=bench.top_k,
        d_model=bench.d_model,
        d_hidden=bench.d_hidden,
        gated=False,
        activation="relu",
    )
    with ExitStack() as stack:
        try:
            hosts = stack.enter_context(shaped_hosts(NUM_RANKS, rate_mbit=rate_mbit)) if rate_mbit else ()
        except NetworkError as error:
            raise ConfigError(f"bench.links_mbit: {error}; or measure loopback: bench.links_mbit=[0]") from error
        here = calibrate(
            sizes, hosts=hosts, num_ranks=NUM_RANKS, folder=run.folder / "ranks", repeats=bench.repeats, name="here"
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
    link = f"{rate_mbit:g} Mbit/s" if rate_mbit else "loopback"
    return launch.Outcome(rows=tuple(rows), summary=summary, sections=(_section(here, paper, link),))


def _alpha(device: Device, stream: Stream, other: Stream) -> float:
    return device.interference.alpha(stream, frozenset({other}))


def _section(here: Device, paper: Device, link: str) -> Section:
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
        note=f"Paper (64 A100, printed) / measured here (two ranks of one core each, {link}). On a CPU one thread "
        "computes and copies, so these two never run at once; a message costs its sender and receiver a share of the "
        "core that computes, which is the interference there is.",
        table=Table(headers=("", *STREAMS, "all"), rows=rows),
    )
