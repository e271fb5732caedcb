"""Stages between products as lines of C++ that change a vector `x` of a value's row.

Source: not in the paper, which has no stages between products but the softmax.
"""

from fusion.emit.cpp.storage import Storage
from fusion.plan.stages import Causal, Elementwise

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")
MINUS_INFINITY = "splat(-INF)"


def stage_line(stage: Elementwise | Causal, operand: str, row: str, column: str) -> str:
    """The line that applies a stage to the vector at row `r` and column `c` of the tile; `inside` masks its entries.

    Args:
        stage: Which.
        operand: An expression for its operand, as `operand_text` gives it.
        row: The letter of the rows.
        column: The letter of the vectors.
    """
    if isinstance(stage, Causal):
        return _causal(stage, row, column)
    match stage.operation:
        case "add":
            return f"x = x + {operand};"
        case "mul":
            return f"x = x * {operand};"
        case "mask":
            return f"x = select({operand}, x, {MINUS_INFINITY});"
        case operation if operation in ACTIVATIONS:
            return f"x = {operation}(x);"
        case operation:
            return f"x = {operation}(x, {operand});"


def _causal(stage: Causal, row: str, column: str) -> str:
    behind = f"({row}_at + r) - ({column}_at + c)"
    if stage.column == column:  # columns up to the row's
        return f"x = select(first({behind} + {stage.diagonal + 1}), x, {MINUS_INFINITY});"
    return f"x = select(first({behind} - {stage.diagonal}), {MINUS_INFINITY}, x);"  # rows from the column's on


def is_fixed(stage: Elementwise | Causal, storage: Storage, column: str) -> bool:
    """Whether a stage's operand is a tensor's entry that is the same along a row.

    Args:
        stage: Which.
        storage: Where its operand lies.
        column: The letter of the vectors.
    """
    operand = stage.operand if isinstance(stage, Elementwise) else None
    return isinstance(operand, str) and operand not in storage.scratch and column not in storage.loops(operand)


def operand_text(stage: Elementwise | Causal, storage: Storage, column: str) -> str:
    """An expression for the operand's vector, or one that holds its number everywhere; empty where there is none.

    Args:
        stage: Which.
        storage: Where its operand lies.
        column: The letter of the vectors.
    """
    operand = stage.operand if isinstance(stage, Elementwise) else None
    if operand is None:
        return ""
    if not isinstance(operand, str):
        return f"splat({operand!r}f)"
    if operand in storage.scratch:
        return f"load({storage.tile(operand)} + r * {storage.ld(operand)} + c)"
    letters = storage.loops(operand)
    row = next((letter for letter in letters if letter != column), "")
    along = f" + r * {storage.stride(operand, row)}" if row else ""
    at = f"{storage.pointer(operand)}{along}"
    if column not in letters:
        return f"all_of(*({at}))" if operand in storage.chain.boolean_inputs else f"splat(scalar(*({at})))"
    if storage.is_last(operand, column):
        return f"load({at} + c, inside)"
    stride = storage.stride(operand, column)
    return f"gather({at} + c * {stride}, {stride}, {column}_len - c)"
