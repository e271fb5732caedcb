"""Calibration: measures this machine and a link, and keeps the device file for layers that choose by themselves."""

import logging
from pathlib import Path

from configs.schema import Config
from moe_pipeline.plan.device import Device, Speed, device_json
from scripts.testbed import launch, link, plots
from scripts.testbed.benchmarks.own_layer import sizes_of
from scripts.testbed.calibration import calibrate
from scripts.testbed.files import cache_folder, write_text
from scripts.testbed.report import Section, Table, figure
from scripts.testbed.rows import Row

logger = logging.getLogger(__name__)

UNITS = {"product": "GFLOP/s", "message": "GB/s", "copy": "GB/s", "rows": "GB/s", "outside": "G rows/s"}


def tune(config: Config, run: launch.Run) -> launch.Outcome:
    """Measure, write the device file, and say where it is.

    Args:
        config: The run's configuration; `tune.link_mbit` is the link, `tune.layer` the widths.
        run: Where to write.

    Raises:
        ConfigError: Where this machine cannot shape links.
    """
    layer, rate_mbit = config.tune.layer, config.tune.link_mbit
    name = f"cpu_{layer.num_ranks}rank_{link.label(rate_mbit)}"
    with link.joined(layer.num_ranks, rate_mbit, loopback="tune.link_mbit=0") as hosts:
        logger.info("measuring %s", name)
        device = calibrate(
            sizes_of(layer, gated=layer.gated, activation=layer.activation),
            hosts=hosts,
            num_ranks=layer.num_ranks,
            folder=run.folder / name,
            repeats=config.tune.rounds,
            name=name,
        )
    text = device_json(device)
    write_text(run.folder / f"{name}.json", text)
    write_text(kept_file(name), text)
    return launch.Outcome(
        rows=tuple(_rows(device)),
        summary={"device_file": str(kept_file(name)), **_interference(device)},
        sections=(_section(device),),
    )


def kept_file(name: str) -> Path:
    """Where a calibrated device is kept between runs, by the platform's convention.

    Args:
        name: The device's.
    """
    return cache_folder() / "devices" / f"{name}.json"


def _speeds(device: Device) -> dict[str, Speed]:
    return {name: getattr(device, name) for name in UNITS}


def _interference(device: Device) -> dict[str, float]:
    return {
        "alpha_compute_beside_comm": device.interference.alpha("compute", frozenset({"comm"})),
        "alpha_comm_beside_compute": device.interference.alpha("comm", frozenset({"compute"})),
        "alpha_copy_beside_comm": device.interference.alpha("copy", frozenset({"comm"})),
        "alpha_comm_beside_copy": device.interference.alpha("comm", frozenset({"copy"})),
    }


def _rows(device: Device) -> list[Row]:
    rows = [
        Row(provider=device.name, metric=f"{name}_rate", unit=UNITS[name], value=speed.points[-1][1] / 1e9)
        for name, speed in _speeds(device).items()
    ]
    rows.append(Row(provider=device.name, metric="message_latency", unit="us", value=device.message.latency_us))
    rows += [
        Row(provider=device.name, metric=name, unit="ratio", value=value)
        for name, value in _interference(device).items()
    ]
    return rows


def _section(device: Device) -> Section:
    series = {
        f"{name} ({UNITS[name]})": ([v / 1e6 for v, _ in speed.points], [rate / 1e9 for _, rate in speed.points])
        for name, speed in _speeds(device).items()
        if len(speed.points) > 1
    }
    table = Table(
        headers=("Speed", "Latency", "Volume: rate", "Unit"),
        rows=tuple(
            (
                name,
                f"{figure(speed.latency_us)} us",
                ", ".join(f"{figure(volume / 1e6)} M: {figure(rate / 1e9)}" for volume, rate in speed.points),
                UNITS[name],
            )
            for name, speed in _speeds(device).items()
        ),
    )
    alphas = _interference(device)
    factors = ", ".join(f"{name.removeprefix('alpha_')} {figure(alpha)}" for name, alpha in alphas.items())
    return Section(
        title=f"Device {device.name}",
        note=f"Measured here, rank 0 of the ranks. Relative speeds: {factors}. One thread computes and copies, so "
        "these two never run at once. Use it with moe.pipeline.device=<the file> or tune.device=<the file>.",
        plots=(plots.curves(series, title="Speeds", x_label="volume (M FLOP, MB)", y_label="rate"),),
        table=table,
    )
