"""The fastest that torch has for a chain, which a kernel must beat."""

import functools
from collections.abc import Callable, Mapping

from torch import Tensor
from torch.nn import functional

from fusion.plan.chain import Chain
from fusion.plan.stages import Causal, Elementwise, MatMul, Softmax
from fusion.run.unfused import run_unfused

Run = Callable[[Mapping[str, Tensor]], Tensor]


def rival(chain: Chain) -> Run:
    """Torch's way to compute a chain: scaled_dot_product_attention where it is one, else an operation per stage.

    Args:
        chain: Any.

    Returns:
        A function from tensors by name to the output.

    Source: not in the paper, whose baseline is PyTorch too.
    """
    return _attention(chain) or functools.partial(run_unfused, chain)


def _attention(chain: Chain) -> Run | None:
    """Softmax attention with a scale, and causal or not; masks of other kinds are left to the stages."""
    match chain.stages:
        case (MatMul() as first, *between, Softmax() as softmax, MatMul() as second):
            pass
        case _:
            return None
    scale, is_causal = 1.0, False
    for stage in between:
        match stage:
            case Elementwise(operation="mul", operand=float(operand)):
                scale *= operand
            case Causal(diagonal=0):
                is_causal = True
            case _:
                return None
    letters, batch = chain.tensors, chain.batch
    query, key, value = first.left, first.right, second.right
    row = next((x for x in letters[query] if x not in batch + first.over), "")
    column = softmax.over
    output = next((x for x in letters[value] if x not in batch + column), "")
    wanted = {query: batch + row + first.over, key: batch + column + first.over, value: batch + column + output}
    if (
        len(batch) > 2
        or second.left != first.out
        or second.over != column
        or any(letters[name] != own for name, own in wanted.items())
    ):
        return None
    if letters[chain.output] != batch + row + output or (is_causal and chain.sizes[row] != chain.sizes[column]):
        return None

    def run(tensors: Mapping[str, Tensor]) -> Tensor:
        q, k, v = (tensors[name][(None,) * (4 - tensors[name].dim())] for name in (query, key, value))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale)
        return attended.reshape(chain.shape(chain.output))

    return run
