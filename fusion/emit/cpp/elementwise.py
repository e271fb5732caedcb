"""Stages between products as lines of C++ that change a vector `x` of a value's row.

Source: not in the paper, which has no stages between products but the softmax.
"""

from collections.abc import Iterator

from fusion.emit.cpp.storage import Storage
from fusion.plan.stages import Causal, Elementwise

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
MINUS_INFINITY = "splat(-INF)"


def stage_lines(stage: Elementwise | Causal, storage: Storage, row: str, column: str) -> Iterator[str]:
    """Lines that apply a stage to the vector at row `r` and column `c` of the tile; `inside` masks its entries.

    Args:
        stage: Which.
        storage: Where its operand lies.
        row: The letter of the rows.
        column: The letter of the vectors.
    """
    if isinstance(stage, Causal):
        yield _causal(stage, row, column)
        return
    operand = "" if stage.operand is None else _operand(stage, storage, column)
    match stage.operation:
        case "add":
            yield f"x = x + {operand};"
        case "mul":
            yield f"x = x * {operand};"
        case "mask":
            yield f"x = select({operand}, x, {MINUS_INFINITY});"
        case operation if operation in ACTIVATIONS:
            yield f"x = {operation}(x);"
        case operation:
            yield f"x = {operation}(x, {operand});"


def _causal(stage: Causal, row: str, column: str) -> str:
    behind = f"({row}_at + r) - ({column}_at + c)"
    if stage.column == column:  # columns up to the row's
        return f"x = select(first({behind} + {stage.diagonal + 1}), x, {MINUS_INFINITY});"
    return f"x = select(first({behind} - {stage.diagonal}), {MINUS_INFINITY}, x);"  # rows from the column's on


def _operand(stage: Elementwise, storage: Storage, column: str) -> str:
    """An expression for the operand's vector, or one that holds its number everywhere."""
    operand = stage.operand
    if not isinstance(operand, str):
        return f"splat({operand!r}f)"
    if operand in storage.scratch:
        return f"load({storage.tile(operand)} + r * {storage.ld(operand)} + c)"
    letters = storage.loops(operand)
    row = next((letter for letter in letters if letter != column), "")
    along = f" + r * {storage.stride(operand, row)}" if row else ""
    at = f"{storage.pointer(operand)}{along}"
    if column not in letters:
        return f"all_of(*({at}))" if stage.operation == "mask" else f"splat(scalar(*({at})))"
    if storage.is_last(operand, column):
        return f"load({at} + c, inside)"
    stride = storage.stride(operand, column)
    return f"gather({at} + c * {stride}, {stride}, {column}_len - c)"
