"""A chain product by product in plain torch: what runs where nothing better does, with torch's own gradients.

Source: our definition.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fusion.plan.chain import Chain
from fusion.plan.stages import MatMul
from fusion.run.tail import finish


def run_unfused(chain: Chain, tensors: Mapping[str, Tensor]) -> Tensor:
    """Run a chain with every value written out.

    Args:
        chain: None of a gradient's.
        tensors: By name, as for any way to run it.

    Returns:
        The output, contiguous; differentiable.
    """
    letters, values = chain.tensors, dict(tensors)
    for stage in chain.stages:
        if isinstance(stage, MatMul):
            equation = f"{letters[stage.left]},{letters[stage.right]}->{letters[stage.out]}"
            value = torch.einsum(equation, values[stage.left], values[stage.right])
            values[stage.out] = finish(chain, chain.epilogue(stage.out), value, values)
    return values[chain.output].contiguous()
