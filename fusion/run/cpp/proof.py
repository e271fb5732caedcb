"""A kernel is used only after its results were found right: on small odd sizes, against the reference in float64.

Source: our definition.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from fusion import reference
from fusion.plan.chain import Chain
from fusion.plan.schedule import Schedule
from fusion.plan.stages import Elementwise
from fusion.run.check import DTYPES

FACTOR = 2.0  # of the unfused computation's own error, as everywhere
SEED = 20241117
MOST_ROUNDS = 2  # of a loop, and a few entries more
EXTRA = 5
MOST_BATCH = 2
FLOOR = 16.0  # roundings of the result's scale that are always granted: a few entries' largest error is luck


class ProofError(RuntimeError):
    """A kernel's results are wrong here; the message says by how much; not in the paper."""


class Run(Protocol):
    """What runs a chain of any sizes, and returns what it writes."""

    def __call__(self, chain: Chain, tensors: Mapping[str, Tensor]) -> list[Tensor]: ...


def draw_tensors(chain: Chain) -> dict[str, Tensor]:
    """Random inputs of a chain, the same each time: masks keep most entries, exponents stay small.

    Args:
        chain: Whose.

    Source: not in the paper.
    """
    generator = torch.Generator().manual_seed(SEED)
    exponents = {
        stage.operand for stage in chain.stages if isinstance(stage, Elementwise) and stage.operation == "exp_minus"
    }
    tensors = {}
    for name in (tensor.name for tensor in chain.inputs):
        if name in chain.boolean_inputs:
            tensors[name] = torch.rand(chain.shape(name), generator=generator) < 0.9
        else:
            drawn = 0.5 * torch.randn(chain.shape(name), generator=generator) + 4.0 * (name in exponents)
            tensors[name] = drawn.to(DTYPES[chain.dtype])
    return tensors


def prove(run: Run, chain: Chain, plan: Schedule) -> None:
    """Compare a kernel with the reference.

    Args:
        run: The kernel.
        chain: That it computes, of its largest sizes.
        plan: Whose tiles say which sizes are worth trying.

    Raises:
        ProofError: It is wrong by more than twice what the same computation without a kernel is.

    Source: our definition.
    """
    small = _small(chain, plan)
    tensors = draw_tensors(small)
    exact = {name: tensor if tensor.dtype == torch.bool else tensor.double() for name, tensor in tensors.items()}
    truth = reference.run(small, exact)
    own, unfused = run(small, tensors)[0].double(), reference.run(small, tensors).double()
    rounding = torch.finfo(DTYPES[chain.dtype]).eps * float(truth.abs().max()) if truth.numel() else 0.0
    allowed = FACTOR * float((unfused - truth).abs().max()) + FLOOR * rounding if truth.numel() else 0.0
    error = float((own - truth).abs().max()) if truth.numel() else 0.0
    if not error <= allowed:
        raise ProofError(f"the kernel of {small} | {plan} is {error:.3g} off, allowed are {allowed:.3g}")


def _small(chain: Chain, plan: Schedule) -> Chain:
    """The same chain of sizes that take two rounds of each loop, with an edge."""
    tiles = dict(plan.tiles)
    sizes = {
        dim.name: min(dim.size, MOST_BATCH if dim.batch else MOST_ROUNDS * tiles[dim.name] + EXTRA)
        for dim in chain.dims
    }
    return replace(chain, dims=tuple(replace(dim, size=sizes[dim.name]) for dim in chain.dims))
