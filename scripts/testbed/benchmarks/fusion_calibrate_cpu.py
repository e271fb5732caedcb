"""Calibration of the CPU: the device file that C++ kernels are planned with, measured anew."""

from configs.schema import Config
from fusion.plan.device import Device
from fusion.run.cpp.calibrate import keep, measure_cpu
from scripts.testbed import launch
from scripts.testbed.report import Section, Table
from scripts.testbed.rows import Row


def tune(config: Config, run: launch.Run) -> launch.Outcome:
    """Measure, keep the device file, and say where it is.

    Args:
        config: The run's configuration; nothing of it is needed.
        run: Where to write.

    Raises:
        BuildError: There is no compiler.
    """
    device = measure_cpu()
    path = keep(device)
    figures = _figures(device)
    rows = tuple(Row(provider=device.arch, metric=name, unit=unit, value=value) for name, unit, value in figures)
    cells = tuple((name, f"{value:.4g}", unit) for name, unit, value in figures)
    section = Section(
        title="This CPU",
        note=f"{device.origin} Kept in {path}.",
        table=Table(headers=("figure", "value", "unit"), rows=cells),
    )
    return launch.Outcome(
        rows=rows, summary={"device_file": str(path)} | {name: value for name, _, value in figures}, sections=(section,)
    )


def _figures(device: Device) -> list[tuple[str, str, float]]:
    return [
        ("core_rate", "GFLOP/s", device.fp32_flops_per_s / device.num_sms / 1e9),
        ("cores", "", device.num_sms),
        ("memory_rate", "GB/s", device.dram_bytes_per_s / 1e9),
        ("cache", "KiB", device.shared_bytes_per_block / 1024),
    ]
