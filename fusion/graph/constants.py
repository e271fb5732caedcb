"""Constants: what a graph computes from nothing, above all causal masks, however they are spelled.

Only what creation operations make is a constant; tensors from outside may change and are inputs.

Source: our definition (the paper has no masks).
"""

import math
import operator

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

aten = torch.ops.aten

MAX_ENTRIES = 2**26  # of a mask that is computed to be recognized; beyond, it stays an input
LITERALS = frozenset((aten.lift_fresh.default, aten.lift_fresh_copy.default))  # how torch.tensor(...) is traced
UNSET = frozenset((aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default))
UNIFORM = frozenset((aten.full_like.default, aten.new_full.default))


def number(node: object) -> float | None:
    """The number that all entries of an operand have, if that is known.

    Args:
        node: An argument of an operation: a Python number, or a node.

    Returns:
        The number, or None.
    """
    if isinstance(node, bool | int | float):
        return float(node)
    if not isinstance(node, Node) or not isinstance(node.meta.get("val"), Tensor):
        return None
    if node.target in UNIFORM:
        return number(node.args[-1])
    if node.target is aten.full.default:
        return number(node.args[1])
    if math.prod(node.meta["val"].shape) == 1:
        value = evaluate(node)
        return None if value is None or value.is_complex() else float(value.item())
    return None


def evaluate(node: Node) -> Tensor | None:
    """Compute a constant, on the CPU.

    Args:
        node: Any of a graph.

    Returns:
        Its value; None if it depends on a tensor from outside or on chance, or has too many entries.
    """
    pending, sources = [node], set[Node]()
    while pending:
        source = pending.pop()
        if not _is_computed(source):
            return None
        sources.add(source)
        pending += [] if source.target in LITERALS else [s for s in source.all_input_nodes if s not in sources]
    values: dict[Node, Tensor] = {}
    for source in sorted(sources):
        values[source] = _compute(source, values)
    return values[node]


def _is_computed(node: Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not isinstance(node.target, torch._ops.OpOverload) or node.target in UNSET:
        return False
    return math.prod(value.shape) <= MAX_ENTRIES and torch.Tag.nondeterministic_seeded not in node.target.tags


def _compute(node: Node, values: dict[Node, Tensor]) -> Tensor:
    if node.target in LITERALS:
        literal = node.all_input_nodes[0]
        return operator.attrgetter(str(literal.target))(node.graph.owning_module).cpu()
    arguments, options = map_arg((node.args, dict(node.kwargs)), values.__getitem__)
    assert callable(node.target)
    return node.target(*arguments, **{**options, **({"device": "cpu"} if "device" in options else {})})


def causal(keep: Tensor) -> tuple[bool, int] | None:
    """Whether a mask is a causal one.

    Args:
        keep: Boolean, [rows, columns], True = takes part; not empty.

    Returns:
        Whether rows and columns change places for it, and the diagonal d: column <= row + d takes part. None if not.
    """
    for swapped in (False, True):
        mask = keep.T if swapped else keep
        rows, columns = mask.shape
        kept = mask.sum(1)
        some = (kept > 0).nonzero().flatten()
        row = int(some[0]) if len(some) else rows  # the first that takes part in anything
        diagonal = int(kept[row]) - 1 - row if len(some) else -rows
        if torch.equal(mask, torch.ones(rows, columns, dtype=torch.bool).tril(diagonal)):
            return swapped, diagonal
    return None
