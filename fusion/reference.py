"""The meaning of a chain in plain torch: one operation per stage, every value written out, autograd as usual.

Tensors are indexed by the chain's own letters, so names here carry none.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from fusion.plan.chain import Chain
from fusion.plan.stages import Causal, Elementwise, MatMul, Softmax
from fusion.run.check import check_tensors


def run(chain: Chain, tensors: Mapping[str, Tensor]) -> Tensor:
    """Run a chain on tensors given by name.

    An operand that lacks a letter is the same along it (broadcast; grouped heads). A softmax whose entries are all -inf
    gives zeros and passes no gradient, as torch's scaled_dot_product_attention does.

    Args:
        chain: What to run.
        tensors: For every input of the chain a tensor of its shape: bool for the boolean inputs, for the others the
            chain's dtype, or float64 for all of them, to have the truth that any precision is compared with.

    Returns:
        The output, [chain.shape(chain.output)], in the dtype of the inputs.

    Raises:
        TypeError: A tensor has another dtype, or is no tensor.
        ValueError: A name is missing or unknown, a shape differs, or tensors lie on several devices.

    Source: our definition (the paper gives no numerical semantics).
    """
    check_tensors(chain, tensors, float64=True)
    letters, values = chain.tensors, dict(tensors)

    def along(name: str, target: str) -> Tensor:
        return _along(values[name], letters[name], letters[target])

    for stage in chain.stages:
        match stage:
            case MatMul(out, left, right):
                values[out] = torch.einsum(
                    f"{letters[left]},{letters[right]}->{letters[out]}", values[left], values[right]
                )
            case Elementwise(x, operation, None):
                values[x] = _activation(values[x], operation)
            case Elementwise(x, "mask", str(operand)):
                values[x] = values[x].masked_fill(~along(operand, x), -torch.inf)
            case Elementwise(x, operation, str() | float() as operand):
                y = along(operand, x) if isinstance(operand, str) else torch.full_like(values[x], operand)
                values[x] = _combine(values[x], operation, y)
            case Causal(x, row, column, diagonal):
                row_index, column_index = (
                    _along(torch.arange(chain.sizes[letter], device=values[x].device), letter, letters[x])
                    for letter in (row, column)
                )
                values[x] = values[x].masked_fill(column_index > row_index + diagonal, -torch.inf)
            case Softmax(x, over):
                values[x] = _softmax(values[x], letters[x].index(over))
    return values[chain.output]


def _along(tensor: Tensor, letters: str, target: str) -> Tensor:
    """A view of `tensor` that broadcasts against one indexed by `target`, which has all of its letters."""
    ordered = tensor.permute([letters.index(letter) for letter in target if letter in letters])
    return ordered[tuple(slice(None) if letter in letters else None for letter in target)]


def _activation(x: Tensor, operation: str) -> Tensor:
    match operation:
        case "relu":
            return functional.relu(x)
        case "silu":
            return functional.silu(x)
        case _:
            return functional.gelu(x, approximate="tanh" if operation == "gelu_tanh" else "none")


def _combine(x: Tensor, operation: str, y: Tensor) -> Tensor:
    match operation:
        case "add":
            return x + y
        case "mul":
            return x * y
        case "exp_minus":
            return torch.exp(x - y.masked_fill(y == -torch.inf, torch.inf))
        case "relu_grad":
            return x * (y > 0)
        case "silu_grad":
            return torch.ops.aten.silu_backward(x, y.expand_as(x))
        case _:
            approximate = "tanh" if operation == "gelu_tanh_grad" else "none"
            return torch.ops.aten.gelu_backward(x, y.expand_as(x), approximate=approximate)


def _softmax(x: Tensor, dim: int) -> Tensor:
    empty = (x == -torch.inf).all(dim, keepdim=True)
    return torch.softmax(x.masked_fill(empty, 0.0), dim).masked_fill(empty, 0.0)
