"""The stages of a value that is there as a tensor, in torch: forwards, and backwards by torch's autograd.

In a chain they are those of the last product; the plan of a backward pass calls them the tail.

Source: our definition (the paper has no stages after its products).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fusion.plan.chain import Chain
from fusion.plan.stages import Causal, Elementwise, Softmax

Tail = Sequence[Elementwise | Causal | Softmax]


def finish(chain: Chain, tail: Tail, x: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
    """Apply the stages of a value, in fp32 or, where x is in float64, in that.

    Args:
        chain: Whose stages they are; it says which letters index what.
        tail: All the stages of one value, none of them a gradient's.
        x: The value as its product leaves it.
        operands: By name the tensors that the stages read.

    Returns:
        The value, in the dtype of x.
    """
    if not tail:
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    for stage in tail:
        letters = chain.tensors[stage.x]
        match stage:
            case Elementwise(operation="mask", operand=operand):
                kept = _along(operands[str(operand)], chain.tensors[str(operand)], letters)
                y = y.masked_fill(~kept, -torch.inf)
            case Elementwise(operation="add" | "mul" as operation, operand=operand):
                other: Any = operand
                if isinstance(operand, str):
                    other = _along(operands[operand], chain.tensors[operand], letters).to(wide)
                y = y + other if operation == "add" else y * other
            case Elementwise(operation=activation):
                y = _ACTIVATIONS[activation](y)
            case Causal(row=row, column=column, diagonal=diagonal):
                rows, columns = (
                    _along(torch.arange(chain.sizes[letter], device=x.device), letter, letters)
                    for letter in (row, column)
                )
                y = y.masked_fill(columns > rows + diagonal, -torch.inf)
            case Softmax(over=over):
                y = _softmax(y, letters.index(over))
    return y.to(x.dtype)


def gradients_of_finish(
    chain: Chain, tail: Tail, x: Tensor, operands: Mapping[str, Tensor], upstream: Tensor, wanted: Collection[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Differentiate `finish`.

    Args:
        chain: As for `finish`.
        tail: As for `finish`.
        x: As for `finish`; where all stages add or scale by a number, any tensor of its shape will do.
        operands: As for `finish`.
        upstream: The gradient of the value that `finish` returns.
        wanted: Names of the operands whose gradients are asked for.

    Returns:
        The gradient of x, and those of the operands by name.
    """
    with torch.enable_grad():
        start = x.detach().requires_grad_()
        leaves = {name: operand.detach().requires_grad_(name in wanted) for name, operand in operands.items()}
        value = finish(chain, tail, start, leaves)
    first, *others = torch.autograd.grad(value, [start, *(leaves[name] for name in wanted)], upstream)
    return first, dict(zip(wanted, others, strict=True))


def _softmax(y: Tensor, dim: int) -> Tensor:
    """Rows without entries are zero; on a CPU, where it is quick to ask, most calls are spared the passes for them."""
    if not y.numel():
        return y.softmax(dim)
    empty = y.detach().amax(dim, keepdim=True) == -torch.inf
    if y.device.type == "cpu" and not bool(empty.any()):
        return y.softmax(dim)
    return y.masked_fill(empty, 0.0).softmax(dim).masked_fill(empty, 0.0)


def _along(tensor: Tensor, letters: str, target: str) -> Tensor:
    """A view of `tensor` that broadcasts against one indexed by `target`, which has all of its letters."""
    ordered = tensor.permute([letters.index(letter) for letter in target if letter in letters])
    return ordered[tuple(slice(None) if letter in letters else None for letter in target)]


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "silu": functional.silu,
}
