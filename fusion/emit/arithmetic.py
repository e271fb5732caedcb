"""Stages between products as lines of Triton, in fp32 and in place.

Source: not in the paper, which has no stages between products but the softmax.
"""

from math import pi, sqrt

from fusion.plan.chain import Chain
from fusion.plan.stages import Causal, Elementwise, Softmax

SQRT_HALF = sqrt(0.5)
TANH_SCALE = 2.0 * sqrt(2.0 / pi)  # gelu's approximation 0.5 y (1 + tanh(u)) is y sigmoid(2 u), u = c (y + d y^3)
TANH_CUBE = 0.044715
MINUS_INFINITY = 'float("-inf")'


def elementwise(operation: str, x: str, operand: str) -> list[str]:
    """Lines that apply an operation to a variable.

    Args:
        operation: Of an Elementwise stage.
        x: Name of the variable, fp32.
        operand: Expression that broadcasts against it: fp32, or boolean for `mask`; unused by activations.

    Returns:
        The lines. What they hold on the way has the variable's name: in a loop a name keeps its shape.
    """
    y = f"{x}_operand"
    match operation:
        case "add":
            return [f"{x} = {x} + {operand}"]
        case "mul":
            return [f"{x} = {x} * {operand}"]
        case "mask":
            return [f"{x} = tl.where({operand}, {x}, {MINUS_INFINITY})"]
        case "relu":
            return [f"{x} = tl.where({x} < 0.0, 0.0, {x})"]
        case "gelu":
            return [f"{x} = 0.5 * {x} * (1.0 + tl.erf({x} * {SQRT_HALF}))"]
        case "gelu_tanh":
            return [f"{x} = {x} / (1.0 + tl.exp(-{_tanh_argument(x)}))"]
        case "silu":
            return [f"{x} = {x} / (1.0 + tl.exp(-{x}))"]
        case "exp_minus":
            return [
                f"{y} = {operand}",
                f"{x} = tl.where({y} == {MINUS_INFINITY}, 0.0, tl.exp({x} - {y}))",
            ]
        case _:
            return [f"{y} = {operand}", *_times_gradient(operation, x, y)]


def causal(stage: Causal, x: str, row: str, column: str) -> str:
    """The line that leaves -inf in a variable where column > row + diagonal.

    Args:
        stage: Which.
        x: Name of the variable.
        row: Expression of the row indices, broadcast against it.
        column: Expression of the column indices, likewise.
    """
    shift = f" + {stage.diagonal}" if stage.diagonal else ""
    return f"{x} = tl.where({column} <= {row}{shift}, {x}, {MINUS_INFINITY})"


def keeps_zeros(chain: Chain, value: str, letter: str) -> bool:
    """Whether entries past the end along a letter, zero in the sum, are still zero after a value's epilogue.

    Args:
        chain: Any.
        value: Of a product.
        letter: That indexes it.

    Returns:
        Whether another product may sum over the whole tile, whatever its other operand holds there.
    """
    inputs = {tensor.name: tensor.dims for tensor in chain.inputs}
    zero = True
    for stage in chain.epilogue(value):
        match stage:
            case Softmax(over=over):
                zero = over == letter
            case Causal() | Elementwise(operation="mask" | "exp_minus"):
                zero = False
            case Elementwise(operation="add", operand=operand):
                zero = zero and letter in inputs.get(str(operand), "")
            case _:
                pass
    return zero


def _tanh_argument(y: str) -> str:
    return f"{TANH_SCALE} * ({y} + {TANH_CUBE} * {y} * {y} * {y})"


def _times_gradient(operation: str, x: str, y: str) -> list[str]:
    sigmoid = f"{x}_sigmoid"
    match operation:
        case "relu_grad":
            return [f"{x} = tl.where({y} > 0.0, {x}, 0.0)"]
        case "silu_grad":
            return [
                f"{sigmoid} = 1.0 / (1.0 + tl.exp(-{y}))",
                f"{x} = {x} * {sigmoid} * (1.0 + {y} * (1.0 - {sigmoid}))",
            ]
        case "gelu_grad":
            density = f"{1 / sqrt(2 * pi)} * tl.exp(-0.5 * {y} * {y})"
            return [f"{x} = {x} * (0.5 * (1.0 + tl.erf({y} * {SQRT_HALF})) + {y} * {density})"]
        case _:
            slope = f"{TANH_SCALE} * (1.0 + {3 * TANH_CUBE} * {y} * {y})"
            return [
                f"{sigmoid} = 1.0 / (1.0 + tl.exp(-({_tanh_argument(y)})))",
                f"{x} = {x} * {sigmoid} * (1.0 + {y} * (1.0 - {sigmoid}) * {slope})",
            ]
