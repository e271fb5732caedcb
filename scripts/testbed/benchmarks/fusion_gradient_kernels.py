"""The kernels of backward passes, searched as any other, and the forward kernels that save what they need."""

from collections.abc import Sequence
from dataclasses import replace

from fusion import Chain
from fusion.emit.triton import emit
from fusion.plan.gradient import Gradients, gradients
from fusion.run.triton.resources import Resources
from scripts.testbed.benchmarks.fusion_winners import Winner
from scripts.testbed.compiled_kernels import CompiledKernels


def gradient_chains(chains: dict[str, Chain]) -> dict[str, Chain]:
    """The chains that the backward passes of chains run, if every input needs a gradient.

    Args:
        chains: By name.

    Returns:
        By a name made of the chain's and of what is computed.
    """
    return {f"{name}_{own.output}": own for name, chain in chains.items() for own in _plan(chain).chains}


def saving(winners: Sequence[Winner], kernels: CompiledKernels) -> list[Winner]:
    """The forward winners whose kernels save something for a backward pass, as these are compiled.

    Args:
        winners: Of forward chains.
        kernels: Where compiled kernels are found.

    Raises:
        RuntimeError: One of them does not compile.
    """
    found = []
    for one in winners:
        if _plan(one.chain).saves_forward:
            kernel = emit(one.chain, one.schedule, exact=True, save_lse=True)
            compiled = kernels.find(kernel, one.chain, one.device)
            if not isinstance(compiled, Resources):
                raise RuntimeError(f"{one.shape} on {one.device.name}, saved for backward: {compiled}")
            found.append(replace(one, shape=f"{one.shape}_saved", compiled=compiled, refused=()))
    return found


def _plan(chain: Chain) -> Gradients:
    return gradients(chain, {tensor.name for tensor in chain.inputs} - chain.boolean_inputs)
