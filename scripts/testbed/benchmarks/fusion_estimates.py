"""Estimates of shared memory against what compiled kernels ask for, over candidates drawn from the pruned space."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fusion import Chain
from fusion.emit.triton import emit
from fusion.plan.device import Device
from fusion.plan.footprint import pipeline, shared_bytes
from fusion.plan.prune import SHARED_SLACK, loaded_operands, shared_estimate
from fusion.plan.schedule import Schedule
from fusion.plan.space import Space
from fusion.run.triton.resources import Resources
from scripts.testbed.compiled_kernels import CompiledKernels


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One candidate; all figures are bytes of a block."""

    device: str
    limit: int
    estimated: int
    operands: int
    """The paper's estimate: the tiles of the products' inputs."""
    compiled: int | None
    """None where it does not compile in time."""
    spills: bool = False

    @property
    def fits(self) -> bool:
        """Whether the compiled kernel fits."""
        return self.compiled is not None and self.compiled <= self.limit

    @property
    def is_right(self) -> bool:
        """Whether the estimate says so too."""
        return (self.estimated <= self.limit) == self.fits

    @property
    def is_rule_right(self) -> bool:
        """Whether the paper's rule says so: its estimate against 1.2 times the limit."""
        return (self.operands <= SHARED_SLACK * self.limit) == self.fits

    @property
    def is_operands_right(self) -> bool:
        """Whether the paper's estimate, taken at its word, says so."""
        return (self.operands <= self.limit) == self.fits

    @property
    def error(self) -> float:
        """What the estimate is off, relative to the compiled bytes."""
        return abs(self.estimated - (self.compiled or 0)) / max(self.compiled or 0, 1)


def draw(space: Space, number: int, *, seed: int) -> list[Schedule]:
    """Candidates of a space, each as likely as any other, with warps and stages by the rule.

    Args:
        space: Of a chain on a device, as rules 1 to 4 leave it.
        number: How many; the same one may come twice.
        seed: Of the choice.
    """
    rng = random.Random(seed)  # noqa: S311
    found: list[Schedule] = []
    weights = [region.candidates for region in space.regions]
    while len(found) < number:
        (region,) = rng.choices(space.regions, weights)
        tiles = {letter: rng.choice(sizes) for letter, sizes in region.choices}
        if shared_estimate(space.chain, tiles, space.device) is None:
            plain = Schedule(region.expression, tuple(tiles.items()))
            warps, stages = pipeline(space.chain, plain, space.device)
            found.append(replace(plain, num_warps=warps, num_stages=stages))
    return found


def estimate(chain: Chain, schedule: Schedule, device: Device, kernels: CompiledKernels) -> Estimate:
    """Compile a candidate and compare.

    Args:
        chain: What is computed.
        schedule: How.
        device: For which.
        kernels: Where compiled kernels are found.
    """
    found = kernels.find(emit(chain, schedule), chain, device)
    tiles = dict(schedule.tiles)
    entries = sum(tiles[first] * tiles[second] for first, second in loaded_operands(chain))
    return Estimate(
        device=device.name,
        limit=device.shared_bytes_per_block,
        estimated=shared_bytes(chain, schedule, device),
        operands=entries * chain.item_bytes,
        compiled=found.shared_bytes if isinstance(found, Resources) else None,
        spills=isinstance(found, Resources) and found.spilled_bytes > 0,
    )


def share(answers: Sequence[bool]) -> float:
    """Part of the answers that are yes.

    Args:
        answers: At least one.
    """
    return sum(answers) / len(answers)
