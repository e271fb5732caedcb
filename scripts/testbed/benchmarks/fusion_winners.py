"""The kernels that searches choose when every candidate has to compile, and whether they compute what they should."""

import math
from dataclasses import dataclass, replace

import torch

from configs.kernels import KernelsSection
from fusion import Chain
from fusion.emit.triton import emit
from fusion.plan.device import Device
from fusion.plan.performance_model import PerformanceModel
from fusion.plan.schedule import Schedule
from fusion.plan.search import Measure
from fusion.reference import run
from fusion.run.check import DTYPES
from fusion.run.triton.launch import launch
from fusion.run.triton.resources import Resources
from scripts.testbed.benchmarks.fusion_plans import planned
from scripts.testbed.compiled_kernels import CompiledKernels

ORDER_FACTOR = 2.0  # errors of a fused kernel over those of the unfused computation in the same dtype
MAX_BATCH = 2


@dataclass(frozen=True, kw_only=True)
class Winner:
    """The best candidate of a chain on a device that compiles, fits and does not spill."""

    shape: str
    chain: Chain
    device: Device
    schedule: Schedule
    predicted_us: float
    compiled: Resources
    refused: tuple[tuple[str, int], ...]
    """Reason -> candidates that the search could not take."""


def winner(
    shape: str, chain: Chain, device: Device, section: KernelsSection, kernels: CompiledKernels, *, seed: int
) -> Winner:
    """Search a chain on a device; what is measured of a candidate is whether it compiles, its time is the model's.

    Args:
        shape: Name of the chain.
        chain: What is computed.
        device: Where.
        section: Population and number of candidates compiled in a round.
        kernels: Where compiled kernels are found.
        seed: Of the search.
    """
    result = planned(chain, device, section, seed=seed, measure=_measure(chain, device, kernels))
    compiled = kernels.find(emit(chain, result.winner), chain, device)
    assert isinstance(compiled, Resources)
    return Winner(
        shape=shape,
        chain=chain,
        device=device,
        schedule=result.winner,
        predicted_us=result.best.predicted.total_us,
        compiled=compiled,
        refused=result.refused,
    )


def _measure(chain: Chain, device: Device, kernels: CompiledKernels) -> Measure:
    model = PerformanceModel(chain, device)

    def measure(schedule: Schedule) -> float | str:
        found = kernels.find(emit(chain, schedule), chain, device)
        if isinstance(found, str):
            return "does not compile"
        if found.spilled_bytes:
            return "spills registers"
        if not found.fits(device):
            return "compiled, does not fit"
        return model.predict(schedule).total_us / 1e6

    return measure


def scaled(chain: Chain, schedule: Schedule) -> Chain:
    """The same chain with sizes of two tiles where there are more, the last one as full as it was.

    Args:
        chain: What is computed.
        schedule: How; its program stays the same but for the number of rounds.
    """
    tiles = dict(schedule.tiles)

    def cut(letter: str, size: int) -> int:
        if letter not in tiles:
            return min(size, MAX_BATCH)
        return size if size <= tiles[letter] else tiles[letter] + (size - 1) % tiles[letter] + 1

    return replace(chain, dims=tuple(replace(dim, size=cut(dim.name, dim.size)) for dim in chain.dims))


def is_right(chain: Chain, schedule: Schedule, *, seed: int) -> bool:
    """Whether a kernel gives, in Triton's interpreter, what the reference gives, within twice the reference's error.

    Args:
        chain: What is computed, small.
        schedule: How.
        seed: Of its inputs.
    """
    from triton import knobs

    generator = torch.Generator().manual_seed(seed)
    tensors = {
        tensor.name: torch.randn(chain.shape(tensor.name), generator=generator).to(DTYPES[chain.dtype])
        for tensor in chain.inputs
    }
    truth = run(chain, {name: tensor.double() for name, tensor in tensors.items()})
    with knobs.runtime.scope():
        knobs.runtime.interpret = True
        output = launch(emit(chain, schedule), chain, tensors)
    rounding = torch.finfo(output.dtype).eps * truth.abs().max().item()
    budget = ORDER_FACTOR * max(_error(run(chain, tensors), truth), rounding)
    return math.isfinite(_error(output, truth)) and _error(output, truth) <= budget


def _error(tensor: torch.Tensor, truth: torch.Tensor) -> float:
    return (tensor.double() - truth).abs().max().item()
