"""Shared memory, registers and spills of fused kernels, compiled for GPUs that need not be here.

The kernels that searches choose have to fit, must not spill, and are run in Triton's interpreter against the reference.
So have those of the chains' gradients to fit, and not to spill.
Candidates drawn at random are compiled too, to see how often the estimate of shared memory says rightly what fits.
"""

import importlib.metadata
import itertools
import logging
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from configs.schema import Config
from fusion import Chain
from fusion.plan.device import Device
from fusion.plan.schedule import Schedule
from fusion.plan.space import search_space
from fusion.run.triton.resources import Compilers
from scripts.testbed import launch, plots
from scripts.testbed.benchmarks.fusion_estimates import Estimate, draw, estimate, share
from scripts.testbed.benchmarks.fusion_gradient_kernels import gradient_chains, saving
from scripts.testbed.benchmarks.fusion_plans import devices, shapes
from scripts.testbed.benchmarks.fusion_shapes import ATTENTION_LABEL, GEMM_LABEL
from scripts.testbed.benchmarks.fusion_winners import Winner, is_right, scaled, winner
from scripts.testbed.compiled_kernels import CompiledKernels
from scripts.testbed.report import Section, Table
from scripts.testbed.rows import Row, headlines

logger = logging.getLogger(__name__)

COMPILERS = 2
TIMEOUT_S = 60.0  # where everything spills, assembling takes longer
KIB = 1024
T = TypeVar("T")
U = TypeVar("U")


def bench(config: Config, run: launch.Run) -> launch.Outcome:
    """Plan, compile, check and compare.

    Args:
        config: The run's configuration: `bench.kernels`.
        run: Where to write; what was compiled is kept in its folder, so that resume=<folder> goes on.

    Raises:
        ConfigError: Where a device cannot be used or a shape is unknown.
    """
    section, key = config.bench.kernels, "bench.kernels"
    found, chains = devices(section.devices, argument=f"{key}.devices"), shapes(section, argument=key)
    pairs = list(itertools.product(chains.items(), found))
    with Compilers(COMPILERS, timeout_s=TIMEOUT_S) as compilers:
        kernels = CompiledKernels(compilers, run.folder / "compiled.jsonl")

        def searched(pair: tuple[tuple[str, Chain], Device]) -> Winner:
            return winner(*pair[0], pair[1], section, kernels, seed=config.seed)

        winners = _side_by_side("winner", searched, pairs)
        backward = list(itertools.product(gradient_chains(chains).items(), found))
        of_gradients = saving(winners, kernels) + _side_by_side("gradient's winner", searched, backward)
        drawn = _drawn(pairs, section.num_compiled, seed=config.seed)
        estimates = _side_by_side("candidate", lambda each: estimate(*each, kernels), drawn)
    failures = _failures(winners, seed=config.seed)
    summary = _summary(winners, estimates, failures) | {
        "gradient_kernels": len(of_gradients),
        "gradient_fits_everywhere": _all_fit(of_gradients),
        "gradient_spilled_kernels": _spilled(of_gradients),
    }
    rows = [row for one in winners for row in _rows(one)] + _error_rows(estimates) + headlines("fusion", summary)
    return launch.Outcome(
        kind="measured",
        rows=tuple(rows),
        summary=summary,
        sections=(
            _estimates_section(estimates),
            *(_winners_section(device, winners, f"Winners on {device.name}") for device in found),
            *(_winners_section(device, of_gradients, f"Kernels of gradients on {device.name}") for device in found),
        ),
    )


def _side_by_side(name: str, function: Callable[[T], U], items: Sequence[T]) -> list[U]:
    """Results in order, with a line in the log for every tenth of them."""
    found = []
    with ThreadPoolExecutor(COMPILERS) as threads:
        for result in threads.map(function, items):
            found.append(result)
            if len(found) % max(1, len(items) // 10) == 0:
                logger.info("%s %d/%d", name, len(found), len(items))
    return found


def _drawn(
    pairs: Sequence[tuple[tuple[str, Chain], Device]], number: int, *, seed: int
) -> list[tuple[Chain, Schedule, Device]]:
    """As many candidates of every chain on every device, in all at least as many as asked for."""
    each = -(-number // len(pairs))
    return [
        (chain, schedule, device)
        for index, ((_, chain), device) in enumerate(pairs)
        for schedule in draw(search_space(chain, device), each, seed=seed + index)
    ]


def _failures(winners: Sequence[Winner], *, seed: int) -> list[str]:
    """The winners that compute something else than the reference, on a few blocks; a kernel of several devices once."""
    kernels = {(scaled(one.chain, one.schedule), one.schedule): one for one in winners}
    failures = []
    for index, ((chain, schedule), one) in enumerate(kernels.items()):
        if not is_right(chain, schedule, seed=seed):
            failures.append(f"{one.device.name}, {one.shape}: {schedule}")
            logger.warning("wrong in the interpreter: %s", failures[-1])
        if (index + 1) % max(1, len(kernels) // 10) == 0:
            logger.info("interpreted %d/%d", index + 1, len(kernels))
    return failures


def _summary(
    winners: Sequence[Winner], estimates: Sequence[Estimate], failures: Sequence[str]
) -> dict[str, float | int | str | None]:
    compiled = [one for one in estimates if one.compiled is not None]
    summary: dict[str, float | int | str | None] = {
        "fits_everywhere": _all_fit(winners),
        "spilled_kernels": _spilled(winners),
        "interpreter_failures": len(failures),
        "winners": len(winners),
        "compiled_candidates": len(compiled),
        "not_compiled_in_time": len(estimates) - len(compiled),
        "triton": importlib.metadata.version("triton"),
    }
    if compiled:
        summary |= {
            "shared_estimate_right": share([one.is_right for one in compiled]),
            "operands_estimate_right": share([one.is_operands_right for one in compiled]),
            "rule_4_right": share([one.is_rule_right for one in compiled]),
            "fitting_candidates": sum(one.fits for one in compiled),
            "wrongly_refused": sum(one.fits and not one.is_right for one in compiled),
            "wrongly_accepted": sum(not one.fits and not one.is_right for one in compiled),
            "shared_estimate_exact": share([one.error == 0 for one in compiled]),
            "shared_estimate_median_error": statistics.median(one.error for one in compiled),
        }
    return summary


def _all_fit(winners: Sequence[Winner]) -> int:
    return int(all(one.compiled.fits(one.device) for one in winners))


def _spilled(winners: Sequence[Winner]) -> int:
    return sum(one.compiled.spilled_bytes > 0 for one in winners)


def _rows(one: Winner) -> list[Row]:
    figures = [
        ("shared", "bytes", float(one.compiled.shared_bytes)),
        ("registers", "registers", float(one.compiled.registers)),
        ("spilled", "bytes", float(one.compiled.spilled_bytes)),
        ("warps", "warps", float(one.schedule.num_warps)),
        ("stages", "stages", float(one.schedule.num_stages)),
    ]
    provider = one.device.name
    rows = [
        Row(provider=provider, metric=f"{name}_{one.shape}", unit=unit, value=value) for name, unit, value in figures
    ]
    predicted = Row(provider=provider, metric=f"time_{one.shape}", unit="us", value=one.predicted_us, kind="simulated")
    return [*rows, predicted]


def _by_device(estimates: Sequence[Estimate]) -> dict[str, list[Estimate]]:
    """The candidates that compiled, by device."""
    found: dict[str, list[Estimate]] = {}
    for one in estimates:
        if one.compiled is not None:
            found.setdefault(one.device, []).append(one)
    return found


def _error_rows(estimates: Sequence[Estimate]) -> list[Row]:
    rows = []
    for device, own in _by_device(estimates).items():
        errors = sorted(one.error for one in own)
        figures = {
            "shared_estimate_right": share([one.is_right for one in own]),
            "operands_estimate_right": share([one.is_operands_right for one in own]),
            "rule_4_right": share([one.is_rule_right for one in own]),
            "shared_estimate_exact": share([error == 0 for error in errors]),
            "shared_estimate_error_p50": statistics.median(errors),
            "shared_estimate_error_p90": errors[int(0.9 * (len(errors) - 1))],
        }
        rows += [Row(provider=device, metric=name, unit="ratio", value=value) for name, value in figures.items()]
    return rows


def _estimates_section(estimates: Sequence[Estimate]) -> Section:
    found = _by_device(estimates)
    series = {
        device: (
            [one.compiled / KIB for one in own if one.compiled],
            [one.estimated / KIB for one in own if one.compiled],
        )
        for device, own in found.items()
    }
    operands = {
        device: (
            [one.compiled / KIB for one in own if one.compiled],
            [one.operands / KIB for one in own if one.compiled],
        )
        for device, own in found.items()
    }
    headers = ("Device", "Compiled", "Fit", "Estimate right", "Exact", "Refused wrongly", "Accepted wrongly",
               "Operands' tiles right", "Rule 4 right", "Spill")  # fmt: skip
    return Section(
        title="Shared memory as estimated and as compiled",
        note="Measured, without a device: candidates that rules 1 to 4 leave, drawn at random for every shape and "
        "device, with warps and stages by the rule. An estimate is right where it says as the compiled kernel does "
        "whether a block fits the device. The paper's estimate is the tiles of the products' inputs, which its rule 4 "
        "holds against 1.2 times the limit; every candidate here has passed that rule.",
        plots=tuple(
            plots.points(each, title=title, x_label="KiB, compiled", y_label="KiB, estimated")
            for title, each in (("Our estimate", series), ("The paper's: operands' tiles", operands))
            if each
        ),
        table=Table(headers=headers, rows=tuple(_estimate_row(device, own) for device, own in found.items())),
    )


def _estimate_row(device: str, own: Sequence[Estimate]) -> tuple[str, ...]:
    return (
        device,
        str(len(own)),
        str(sum(one.fits for one in own)),
        f"{share([one.is_right for one in own]):.1%}",
        f"{share([one.error == 0 for one in own]):.1%}",
        str(sum(one.fits and not one.is_right for one in own)),
        str(sum(not one.fits and not one.is_right for one in own)),
        f"{share([one.is_operands_right for one in own]):.1%}",
        f"{share([one.is_rule_right for one in own]):.1%}",
        str(sum(one.spills for one in own)),
    )


def _winners_section(device: Device, winners: Sequence[Winner], title: str) -> Section:
    own = [one for one in winners if one.device is device]
    refused: dict[str, int] = {}
    for reason, number in (pair for one in own for pair in one.refused):
        refused[reason] = refused.get(reason, 0) + number
    refusals = "; ".join(f"{reason}: {number}" for reason, number in refused.items()) or "none"
    return Section(
        title=title,
        note=f"{GEMM_LABEL} (G1-G12) and {ATTENTION_LABEL}, fp16. Time is the paper's model's (simulated); shared "
        f"memory, registers and spills are compiled, of a block's {device.shared_bytes_per_block / KIB:.0f} KiB. "
        f"Candidates that searches refused: {refusals}.",
        table=Table(
            headers=("Shape", "Schedule", "Shared", "Registers", "Spilled", "Predicted", "Compiled in"),
            rows=tuple(
                (
                    one.shape,
                    str(one.schedule),
                    f"{one.compiled.shared_bytes / KIB:.1f} KiB",
                    str(one.compiled.registers),
                    f"{one.compiled.spilled_bytes} B",
                    f"{one.predicted_us:.2f} us",
                    f"{one.compiled.seconds:.2f} s",
                )
                for one in own
            ),
        ),
    )
