"""Plans of chains on devices that experiments share: the search's winner, and the same chain kernel by kernel."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from configs.kernels import KernelsSection
from configs.typed import ConfigError, closest
from fusion import Chain
from fusion.plan.device import Device, DeviceError, load_device
from fusion.plan.footprint import pipeline, shared_bytes
from fusion.plan.partition import alone
from fusion.plan.schedule import Schedule
from fusion.plan.search import Measure, Result, search
from fusion.plan.space import Kind, search_space
from fusion.plan.stages import MatMul, operands
from fusion.plan.traffic import traffic
from scripts.testbed.benchmarks.fusion_shapes import SHAPES


def devices(names: Sequence[str], *, argument: str) -> list[Device]:
    """Device files by name.

    Args:
        names: Of files that come with the package, or paths.
        argument: The configuration's key, for errors.

    Raises:
        ConfigError: Where one cannot be used.
    """
    try:
        return [load_device(name) for name in names]
    except DeviceError as error:
        raise ConfigError(f"{argument}: {error}") from error


def shapes(section: KernelsSection, *, argument: str) -> dict[str, Chain]:
    """The chains that a section names, or all.

    Args:
        section: Of the configuration.
        argument: Its key, for errors.

    Raises:
        ConfigError: Where a name is unknown.
    """
    for name in section.shapes:
        if name not in SHAPES:
            raise ConfigError(f"{argument}.shapes: got {name!r}, {closest(name, tuple(SHAPES))}")
    return {name: SHAPES[name] for name in section.shapes or SHAPES}


def chains_on_devices(
    section: KernelsSection, *, argument: str
) -> tuple[list[Device], list[tuple[str, Chain, Device]]]:
    """The devices of a section, and each of its chains by name on each of them.

    Args:
        section: Of the configuration.
        argument: Its key, for errors.

    Raises:
        ConfigError: Where a device cannot be used or a name is unknown.
    """
    found, chains = devices(section.devices, argument=f"{argument}.devices"), shapes(section, argument=argument)
    return found, [(name, chain, device) for device in found for name, chain in chains.items()]


def planned(
    chain: Chain,
    device: Device,
    section: KernelsSection,
    *,
    seed: int,
    kind: Kind = "mcfuser",
    measure: Measure | None = None,
) -> Result:
    """The search's result for a chain on a device.

    Args:
        chain: What is computed.
        device: Where.
        section: Population and number of candidates measured in a round.
        seed: Of the search.
        kind: The space.
        measure: Times or refuses a schedule; None trusts the model.
    """
    return search(
        search_space(chain, device, kind=kind),
        measure=measure,
        pipeline=pipeline,
        shared_bytes=shared_bytes,
        population=section.population,
        top=section.top,
        seed=seed,
    )


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One kernel of a chain that is not fused."""

    moved_bytes: int
    busy_us: float
    """What the model says of a product; the bytes of another stage at the device's bandwidth."""


@functools.lru_cache(maxsize=1024)
def unfused(chain: Chain, device: Device, section: KernelsSection, *, seed: int) -> tuple[Kernel, ...]:
    """The same chain with a kernel for each stage, as PyTorch runs it eagerly, the products planned by the same search.

    Args:
        chain: What is computed.
        device: Where.
        section: As for `planned`.
        seed: As for `planned`.
    """
    kernels = []
    for stage in chain.stages:
        if isinstance(stage, MatMul):
            single = alone(chain, stage.out)
            found = planned(single, device, section, seed=seed)
            kernels.append(Kernel(moved_bytes=moved(single, found.winner), busy_us=found.best.predicted.total_us))
        else:
            moved_bytes = 2 * chain.num_bytes(stage.x) + sum(chain.num_bytes(name) for name in operands(stage))
            kernels.append(Kernel(moved_bytes=moved_bytes, busy_us=1e6 * moved_bytes / device.dram_bytes_per_s))
    return tuple(kernels)


def moved(chain: Chain, schedule: Schedule) -> int:
    """Bytes that the kernel of a schedule loads and stores.

    Args:
        chain: What is computed.
        schedule: How.
    """
    return traffic(chain, schedule.program(chain), dict(schedule.tiles)).bytes
