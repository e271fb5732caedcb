"""The vocabulary of a chain: dimensions, inputs, and four kinds of stage that run in order.

A tensor is a name and the letters that index it, one capital letter per dimension: `B[K,N]` is `Input("B", "KN")`,
and stored as nn.Linear does it is `Input("B", "NK")`. Everything broadcasts and contracts by letter, so a transposed
operand, a weight shared by a batch and grouped heads are only operands with other letters.

A MatMul names a new value; the other stages change one in place, before anything reads it: a value is one buffer.

Source: MCFuser (arXiv:2506.22169) for chains of products and softmax; biases, gates and masks are not in the paper.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Activation = Literal["identity", "relu", "gelu", "gelu_tanh", "silu"]
ActivationGrad = Literal["relu_grad", "gelu_grad", "gelu_tanh_grad", "silu_grad"]
Operation = Literal[
    "add", "mul", "mask", "relu", "gelu", "gelu_tanh", "silu",
    "relu_grad", "gelu_grad", "gelu_tanh_grad", "silu_grad", "exp_minus",
]  # fmt: skip


@dataclass(frozen=True)
class Dim:
    """A dimension: one capital letter, its size, and whether it is a batch (then chains along it are independent)."""

    name: str
    size: int
    batch: bool = False


@dataclass(frozen=True)
class Input:
    """A tensor from the caller: its name and its letters in storage order."""

    name: str
    dims: str


@dataclass(frozen=True)
class MatMul:
    """`out = left right`, summed over the letter `over`; `out` keeps all the other letters, in the chain's order."""

    out: str
    left: str
    right: str
    over: str


@dataclass(frozen=True)
class Elementwise:
    """`x = operation(x, operand)`, in place.

    `add` and `mul` take a number (scale) or a tensor over some of x's letters (bias, residual, additive mask, gate).
    `mask` takes a boolean input likewise, True = takes part, and leaves -inf elsewhere.
    Activations take None; `gelu` is the exact one. Their gradients multiply x by the derivative at the operand.
    `exp_minus` is exp(x - operand), a softmax whose log-sum-exp is known; where the operand is -inf the result is zero.
    """

    x: str
    operation: Operation
    operand: str | float | None = None


@dataclass(frozen=True)
class Causal:
    """Leaves -inf in `x` where column > row + diagonal, in place: 0 aligns the first row and column, N - M the last."""

    x: str
    row: str
    column: str
    diagonal: int = 0


@dataclass(frozen=True)
class Softmax:
    """`x = softmax(x)` over one letter, in place; where every entry is -inf the result is zero."""

    x: str
    over: str


Stage = MatMul | Elementwise | Causal | Softmax


def operands(stage: Stage) -> tuple[str, ...]:
    """Names of the tensors that a stage only reads, in argument order; not in the paper."""
    match stage:
        case MatMul(left=left, right=right):
            return left, right
        case Elementwise(operand=str(operand)):
            return (operand,)
        case _:
            return ()


def product_dims(product: MatMul, tensors: Mapping[str, str], order: str) -> str:
    """Letters of a product's value in the chain's `order`, from those of its operands; not in the paper."""
    indexed = set(tensors[product.left]) | set(tensors[product.right])
    return "".join(letter for letter in order if letter in indexed and letter != product.over)
