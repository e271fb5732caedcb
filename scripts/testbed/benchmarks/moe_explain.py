"""Explanation: every pair of chunk count and strategy on a device, what it takes, and why one is chosen."""

import logging

from configs.schema import Config
from configs.typed import ConfigError
from moe_pipeline.plan.budget import Budget, BudgetError
from moe_pipeline.plan.device import Device, DeviceError, load_device
from moe_pipeline.plan.ledger import LayerShape
from moe_pipeline.plan.selector import Candidate, candidates, select, within
from scripts.testbed import launch, plots
from scripts.testbed.benchmarks.own_layer import layer_shape, sizes_of
from scripts.testbed.report import Section, Table, figure
from scripts.testbed.rows import Row

logger = logging.getLogger(__name__)

MIB = 2**20


def tune(config: Config, run: launch.Run) -> launch.Outcome:
    """Predict all pairs for a layer and choose.

    Args:
        config: The run's configuration: `tune.layer`, `tune.device` and the budgets.
        run: Where to write.

    Raises:
        ConfigError: Where the device cannot be read or nothing fits.
    """
    layer = config.tune.layer
    shape = layer_shape(
        sizes_of(layer, gated=layer.gated, activation=layer.activation),
        num_tokens=layer.num_tokens,
        num_ranks=layer.num_ranks,
        element_bytes=layer.element_bytes,
    )
    try:
        device = load_device(config.tune.device)
        budget = within(device, config.tune.device_budget_bytes, config.tune.host_budget_bytes)
        found = candidates(shape, device, budget=budget)
        for one in found:
            logger.info("%s", one)
        chosen = select(found, budget)
    except (BudgetError, DeviceError) as error:
        raise ConfigError(f"tune: {error}") from error
    return launch.Outcome(
        kind="simulated",
        rows=tuple(row for one in found for row in _rows(one)),
        summary={
            "num_chunks": chosen.num_chunks,
            "restore": chosen.restore,
            "predicted_us": chosen.predicted_us,
            "device_bytes": chosen.footprint.device_bytes,
            "host_bytes": chosen.footprint.host_bytes,
            "refused": sum(bool(one.refused) for one in found),
        },
        sections=(_section(shape, device, budget, found, chosen),),
    )


def _name(one: Candidate) -> str:
    return f"n{one.num_chunks}_{one.restore}"


def _rows(one: Candidate) -> list[Row]:
    return [
        Row(provider=_name(one), metric="step_time", unit="us", value=one.predicted_us),
        Row(provider=_name(one), metric="step_time_equation_10", unit="us", value=one.equation_10_us),
        Row(provider=_name(one), metric="step_time_phases", unit="us", value=one.phases_us),
        Row(provider=_name(one), metric="device_memory", unit="MiB", value=one.footprint.device_bytes / MIB),
        Row(provider=_name(one), metric="host_memory", unit="MiB", value=one.footprint.host_bytes / MIB),
    ]


def _section(
    shape: LayerShape, device: Device, budget: Budget, found: tuple[Candidate, ...], chosen: Candidate
) -> Section:
    restores: dict[str, None] = dict.fromkeys(one.restore for one in found)
    memory_time = {
        restore: (
            [one.footprint.device_bytes / MIB for one in found if one.restore == restore],
            [one.predicted_us / 1e3 for one in found if one.restore == restore],
        )
        for restore in restores
    }
    by_chunks = {
        restore: (
            [float(one.num_chunks) for one in found if one.restore == restore],
            [one.predicted_us / 1e3 for one in found if one.restore == restore],
        )
        for restore in restores
    }
    table = Table(
        headers=("n", "Strategy", "Simulated", "Equation 10", "Phases", "Device", "Host", ""),
        rows=tuple(
            (
                str(one.num_chunks),
                one.restore,
                f"{one.predicted_us / 1e3:,.2f} ms",
                f"{one.equation_10_us / 1e3:,.2f} ms",
                f"{one.phases_us / 1e3:,.2f} ms",
                f"{one.footprint.device_bytes / MIB:,.1f} MiB",
                f"{one.footprint.host_bytes / MIB:,.1f} MiB",
                "chosen" if one is chosen else one.refused or "fits",
            )
            for one in sorted(found, key=lambda one: one.predicted_us)
        ),
    )
    return Section(
        title=f"n={chosen.num_chunks} with {chosen.restore} on {device.name}",
        note=f"{shape.tokens:,} tokens a rank x {shape.d_model}, hidden {shape.hidden.d_hidden}, {shape.num_experts} "
        f"experts on {shape.num_ranks} ranks, top {shape.top_k}; all times are simulated. {device.origin} The fastest "
        "pair that may be taken is chosen; within 1 % less host memory, then fewer copies, then fewer chunks decide. "
        f"Budgets: {figure(budget.device_bytes)} bytes on the device, {figure(budget.host_bytes)} on the host.",
        plots=(
            plots.curves(by_chunks, title="Step", x_label="chunks n", y_label="ms (simulated)"),
            plots.curves(
                memory_time, title="Memory against time", x_label="MiB on the device", y_label="ms (simulated)"
            ),
        ),
        table=table,
    )
